from __future__ import annotations

import numpy as np
import pytest

from torchrec_mdr.data.shuffle import BatchPlan, Folds


@pytest.mark.parametrize("num_rows", [1, 23, 24, 25, 1003])
@pytest.mark.parametrize("world_size", [1, 2, 5, 7, 32])
@pytest.mark.parametrize("shuffle_rows", [72, 240, 10_000])
def test_rounds_and_shares_cover_all_rows(num_rows: int, world_size: int, shuffle_rows: int) -> None:
    num_batches = -(-num_rows // 100)
    seen: list[int] = []
    for rank in range(world_size):
        plan = BatchPlan(num_rows, num_batches, rank, world_size, shuffle_rows)
        stored: list[int] = []
        for number in range(plan.num_rounds):
            windows = plan.windows(0, number)
            assert plan.round_start(number) == len(stored)
            assert all(stop <= start for (_, stop), (start, _) in zip(windows, windows[1:], strict=False))
            # stored at their own numbers
            stored.extend(plan.order(0, number, [start for start, _ in windows]).tolist())
        bounds = [plan.bounds(batch) for batch in range(num_batches)]
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == len(stored)
        seen.extend(stored)
    assert sorted(seen) == list(range(num_rows))


def test_windows_come_in_another_order_each_epoch() -> None:
    plan = BatchPlan(num_rows=24 * 100, num_batches=1, shuffle_rows=24 * 10)
    starts = [[plan.windows(epoch, number)[0][0] for number in range(10)] for epoch in range(3)]
    assert all(sorted(order) == list(range(0, 100, 10)) for order in starts)
    assert starts[0] != starts[1] != starts[2]


def test_folds_are_even_and_unrelated_to_neighbours() -> None:
    positions = np.arange(100_000)
    folds = np.stack([Folds(8, (fold,)).selects(positions) for fold in range(8)])
    assert (folds.sum(axis=0) == 1).all()
    assert np.abs(folds.mean(axis=1) - 1 / 8).max() < 0.005
    same = (folds[:, 1:] & folds[:, :-1]).sum() / len(positions)
    assert abs(same - 1 / 8) < 0.005


@pytest.mark.parametrize("keep", [(), (8,), (-1, 2)])
def test_unknown_folds_are_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must name at least one of 0 to 7"):
        Folds(8, keep)


def test_lanes_epochs_and_rounds_are_shuffled_each_in_its_own_way() -> None:
    plan = BatchPlan(num_rows=24 * 100, num_batches=1, shuffle_rows=24 * 50)
    orders = [
        tuple(lane - min(lane))
        for epoch in range(2)
        for number in range(2)
        for lane in plan.order(epoch, number, [start for start, _ in plan.windows(epoch, number)]).reshape(50, 24).T
    ]
    assert len(set(orders)) == 2 * 2 * 24
