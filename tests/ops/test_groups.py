"""How rows are grouped."""

from __future__ import annotations

import pytest
import torch

from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

IDS = torch.tensor([3, 0, 3, 1, 0, 3])


def members(groups: DomainGroups) -> list[tuple[int, list[int]]]:
    """Adapter and batch rows of each group."""
    ends = groups.offsets.tolist()
    order = torch.arange(len(groups.ids)) if groups.permutation is None else groups.permutation
    adapters = range(len(ends)) if groups.adapter_ids is None else groups.adapter_ids.tolist()
    starts = [0, *ends[:-1]]
    return [(a, order[start:end].tolist()) for a, start, end in zip(adapters, starts, ends, strict=True)]


def test_unsorted_rows_keep_their_order_within_a_group() -> None:
    groups = DomainGroups.from_ids(IDS, 5)
    assert members(groups) == [(0, [1, 4]), (1, [3]), (2, []), (3, [0, 2, 5]), (4, [])]
    assert groups.offsets.dtype == torch.int32
    rows = torch.randn(6, 2)
    assert torch.equal(groups.group(rows), rows[IDS.argsort(stable=True)])
    assert torch.equal(groups.ungroup(groups.group(rows)), rows)


def test_sorted_rows_are_not_moved() -> None:
    groups = DomainGroups.from_sorted_ids(IDS.sort().values, 5)
    assert groups.permutation is None and groups.inverse is None
    assert groups.offsets.tolist() == DomainGroups.from_ids(IDS, 5).offsets.tolist()
    rows = torch.randn(6, 2)
    assert groups.group(rows) is rows and groups.ungroup(rows) is rows


def test_further_divisions_get_a_group_for_each_combination() -> None:
    ids = torch.tensor([[0, 0], [0, 2], [0, 2], [2, 0], [2, 1]])
    first, second = BatchDomains.from_sorted(ids, (3, 4)).groups
    assert members(first) == [(0, [0, 1, 2]), (1, []), (2, [3, 4])]
    assert members(second) == [(0, [0]), (2, [1, 2]), (0, [3]), (1, [4])]
    assert second.num_adapters == 4 and second.ids.tolist() == [0, 2, 2, 0, 1]


def test_one_division_may_come_as_a_vector() -> None:
    assert BatchDomains.from_ids(IDS, [4]).ids.shape == (6, 1)


@pytest.mark.parametrize("shape", [(6, 2), (6,), (6, 3, 1)])
def test_ids_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 3\], one column a division, not"):
        BatchDomains.from_ids(torch.zeros(shape, dtype=torch.int64), [2, 2, 2])


@pytest.mark.parametrize("bad", [-2, 4])
def test_an_id_outside_its_division_is_named(bad: int) -> None:
    ids = IDS.clone()
    ids[2] = bad
    with pytest.raises(ValueError, match=rf"domain id {bad} in row 2 is outside the division's range \[0, 4\)"):
        DomainGroups.from_ids(ids, 4)


def test_ids_that_are_not_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be an int64 vector, not torch.float32"):
        DomainGroups.from_ids(IDS.float(), 4)


def test_moving_keeps_every_tensor() -> None:
    domains = BatchDomains.from_ids(IDS.unsqueeze(1), [4])
    moved = domains.to(torch.device("meta"))
    assert moved.ids.is_meta and moved.groups[0].num_adapters == 4
    for name, value in vars(domains.groups[0]).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved.groups[0], name).is_meta, name
