"""Which cases of a product run every day."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.cases import crossed, one_at_a_time


def daily(mark: pytest.MarkDecorator) -> list[tuple[object, ...]]:
    return [case.values for case in mark.args[1] if not case.marks]


def test_any_two_values_meet_in_few_cases() -> None:
    axes = {"a": "uvwxy", "b": [1, 2, 3, 4], "c": [True, False], "d": [(), (1,), (1, 2)]}
    mark = crossed(**axes)
    assert [case.values for case in mark.args[1]] == list(product(*axes.values()))  # none is lost
    met = {pair for case in daily(mark) for pair in combinations(enumerate(case), 2)}
    wanted = {pair for case in product(*axes.values()) for pair in combinations(enumerate(case), 2)}
    assert met == wanted and 20 <= len(daily(mark)) <= 24


def test_one_axis_leaves_the_corner_at_a_time() -> None:
    mark = one_at_a_time(a="uvw", b=[1, 2], c=[True, False])
    assert daily(mark) == [("u", 1, True), ("u", 1, False), ("u", 2, True), ("v", 1, True), ("w", 1, True)]
    assert len(mark.args[1]) == 12
