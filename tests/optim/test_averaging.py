"""Averages of weights against a loop in plain numbers."""

from __future__ import annotations

import pytest
import torch

from torchrec_mdr.optim.averaging import WeightAverage


def averaged(average: WeightAverage) -> float:
    """The average, as a validation sees it."""
    average.swap()
    value = float(average.live[0])
    average.swap()
    return value


@pytest.mark.parametrize("every", [1, 5])
def test_equals_a_loop(every: int) -> None:
    weight = torch.zeros(1, dtype=torch.float64)
    average, expected = WeightAverage([weight], 0.9, every), 0.0
    for step in range(1, 61):
        weight.fill_(float(step % 7))
        average.update()
        if step % every == 0:
            seen = step // every
            keep = min(0.9**every, (1 + seen) / (10 + seen))
            expected = keep * expected + (1 - keep) * float(weight)
        assert averaged(average) == pytest.approx(expected if step >= every else float(weight))


def test_before_its_first_look_the_weights_themselves_are_judged() -> None:
    """A stage of four steps is not judged by its start."""
    weight = torch.zeros(1)
    average = WeightAverage([weight], 0.99)
    for step in range(1, 5):
        weight.fill_(float(step))
        average.update()
        assert averaged(average) == step and float(weight) == step


@pytest.mark.parametrize("steps", [0.5, 1.0, 3.0, 30.0, 1000.0])
def test_one_that_reaches_over_so_many_steps_follows_from_the_first(steps: float) -> None:
    weight = torch.zeros(1, dtype=torch.float64)
    average = WeightAverage.over([weight], steps)
    assert average.every <= max(steps / 20, 1)
    weight.fill_(1.0)
    for _ in range(average.every):
        average.update()
    assert averaged(average) > 0.5  # the start is forgotten at the first look
    for _ in range(40 * round(max(steps, 10))):
        average.update()
    assert averaged(average) == pytest.approx(1.0)
    weight.fill_(0.0)
    for _ in range(round(max(steps, 1))):
        average.update()
    assert averaged(average) == pytest.approx(0.3679 if steps > 2 else 0.5, abs=0.12)
