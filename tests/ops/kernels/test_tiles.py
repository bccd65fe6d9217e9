"""Tiles and what is kept of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.kernels.rows import KINDS, N, rows_in
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.triton import tile_map
from torchrec_mdr.ops.triton.tile_map import Layout


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("num_groups", [1, 2, 7, 64, 200])
def test_each_row_is_in_one_tile_of_its_group_and_each_group_has_a_tile(num_groups: int, size: int) -> None:
    torch.manual_seed(num_groups)
    for most in (0, 1, 3, 40, 150):
        counts = torch.randint(most + 1, (num_groups,)) * (torch.rand(num_groups) < 0.7)
        ends = counts.cumsum(0).int()
        rest = int(torch.randint(most + 1, ()))  # rows without an adapter
        layout = Layout(ends, None, int(ends[-1]) + rest)
        made = layout.tiles(size, owners=True)
        group, first, end = made.tiles.tolist()
        used = [place for place in range(made.num_tiles) if group[place] >= 0]
        rows = [(row, group[place]) for place in used for row in range(first[place], end[place])]
        owner = torch.repeat_interleave(torch.arange(num_groups + 1), torch.cat([counts, torch.tensor([rest])]))
        assert sorted(rows) == list(enumerate(owner.tolist()))
        assert {group[place] for place in used} == set(range(num_groups + 1))
        assert all(end[place] - first[place] <= size for place in used)
        assert all(first[place] >= end[place] for place in range(made.num_tiles) if group[place] < 0)
        several = [g for g, count in enumerate(counts.tolist()) if count > size]
        assert sorted(g for g in made.owners.tolist() if g >= 0) == several


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_groups_rows_by_their_adapter(kind: str) -> None:
    groups = rows_in(kind, 40)
    layout = Layout.of(groups)
    ids = groups.ids if layout.permutation is None else groups.ids[layout.permutation]
    starts = [0, *layout.offsets.tolist()]
    assert layout.num_groups == N and layout.num_rows == 40
    assert [set(ids[a:b].tolist()) - {g} for g, (a, b) in enumerate(zip(starts, starts[1:], strict=False))] == [
        set()
    ] * N
    assert bool((ids[starts[-1] :] == -1).all())


def test_more_adapters_than_int16_counts() -> None:
    count = 2**15 + 1
    groups = DomainGroups(torch.tensor([count - 1, -1, 3]), torch.tensor([1, 2, 3]).int(), count, torch.arange(3))
    layout = Layout.of(replace(groups, may_miss=True))
    assert layout.permutation is not None and layout.permutation.tolist() == [2, 0, 1]
    assert layout.offsets[[2, 3, count - 2, count - 1]].tolist() == [0, 1, 1, 2]


def test_tiles_are_made_once_a_batch_and_anew_where_rows_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(tile_map, "_map", lambda *given: made.append(given) or len(made))
    groups = DomainGroups.from_sorted_ids(torch.tensor([0, 0, 1, 3]), N)
    first = Layout.of(groups).tiles(16)
    assert first == Layout.of(replace(groups)).tiles(16) and len(made) == 1
    assert Layout.of(groups).tiles(32) != first and Layout.of(groups).tiles(16, owners=True) != first
    groups.offsets.copy_(torch.tensor([1, 1, 1, 4, 4]))
    assert Layout.of(groups).tiles(16) != first


def test_nothing_is_kept_of_a_batch_that_is_gone() -> None:
    groups = rows_in("combinations", 40)
    before = len(tile_map._kept)
    Layout.of(groups).tiles(16)
    assert len(tile_map._kept) == before + 2  # the ids', and the offsets that were made of them
    del groups
    assert len(tile_map._kept) == before
