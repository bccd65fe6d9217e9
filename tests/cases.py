"""Cases of several axes: a few of them for every day, and the rest of the product marked full, for `make test-full`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import combinations, product
from typing import Any

import pytest
import torch

Case = tuple[Any, ...]


def crossed(indirect: tuple[str, ...] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by several axes: any two values of two axes meet in a case; all other cases are marked full.

    Args:
        indirect (tuple[str, ...]): axes that are fixtures.
        **axes: the values of each parameter.
    """
    cases = list(product(*axes.values()))
    return _parametrize(axes, cases, set(pairwise_cover(cases)), indirect)


def one_at_a_time(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by several axes: each value beside the first ones of all others; the rest is marked full."""
    cases = list(product(*axes.values()))
    differ = (sum(a is not b for a, b in zip(case, cases[0], strict=True)) for case in cases)
    return _parametrize(axes, cases, {place for place, number in enumerate(differ) if number <= 1})


def pairwise_cover(cases: list[Case]) -> Iterator[int]:
    """Places of few of the cases, in which any two values meet that meet in one of all cases."""
    of_case = [set(combinations(enumerate(map(_name, case)), 2)) for case in cases]
    missing = set().union(*of_case)
    while missing:
        best = max(range(len(cases)), key=lambda place: len(of_case[place] & missing))
        missing -= of_case[best]
        yield best


def _parametrize(
    axes: Iterable[str], cases: list[Case], daily: Collection[int], indirect: tuple[str, ...] = ()
) -> pytest.MarkDecorator:
    arguments = [
        pytest.param(*case, id="-".join(map(_name, case)), marks=[] if place in daily else pytest.mark.full)
        for place, case in enumerate(cases)
    ]
    return pytest.mark.parametrize(list(axes), arguments, indirect=indirect)


def _name(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "x".join(map(_name, value)) or "none"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(getattr(value, "__name__", value))
