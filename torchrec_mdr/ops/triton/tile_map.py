"""Rows in the form that the kernels take: tiles of one adapter each, mapped once a batch and without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.triton.tile_kernels import map_tiles

_BLOCK = 128


class TileMap(NamedTuple):
    """Tiles of at most ``size`` rows of one group.

    Args:
        size (int): most rows of a tile.
        tiles (Tensor): int32 [3, T]: each tile's group, first grouped row and end; group -1 for a tile that is not
            needed. A group without rows has an empty tile. Group N holds the rows without an adapter.
        owners (Tensor): int32 [rows // size + 1]: the group with more than ``size`` rows whose first row at a multiple
            of ``size`` is this one, or -1; empty where it was not asked for.
    """

    size: int
    tiles: Tensor
    owners: Tensor

    @property
    def num_tiles(self) -> int:
        """T, which rows and groups bound."""
        return self.tiles.shape[1]


class Layout(NamedTuple):
    """Rows grouped by adapter.

    Args:
        offsets (Tensor): int32 [N], the exclusive end of each adapter's rows; those without an adapter follow.
        permutation (Tensor | None): int64 [B], the batch row at each grouped position.
        num_rows (int): B.
    """

    offsets: Tensor
    permutation: Tensor | None
    num_rows: int

    @property
    def num_groups(self) -> int:
        """N."""
        return self.offsets.numel()

    @staticmethod
    def of(groups: DomainGroups) -> Layout:
        """One group for each adapter: where several share one, tiles would be small, and sums would have to meet."""
        if groups.adapter_ids is None:
            return Layout(groups.offsets, groups.permutation, groups.ids.numel())
        made: Layout = _once(groups.ids, ("layout", groups.num_adapters), lambda: _by_adapter(groups))
        return made

    def tiles(self, size: int, owners: bool = False) -> TileMap:
        """Cuts the rows into tiles, once for all who ask.

        Args:
            size (int): most rows of a tile.
            owners (bool): whether the map says which groups have several tiles.
        """
        name = "tiles", size, owners, self.num_rows
        made: TileMap = _once(self.offsets, name, lambda: _map(self, size, owners))
        return made


def _by_adapter(groups: DomainGroups) -> Layout:
    count = groups.num_adapters
    keys = torch.where(groups.ids < 0, count, groups.ids) if groups.may_miss else groups.ids
    keys = keys.to(torch.int16 if count < 2**15 else torch.int32)  # each byte is a pass of the sort
    keys, permutation = torch.sort(keys, stable=True)
    bounds = torch.arange(1, count + 1, device=keys.device, dtype=torch.int32)
    return Layout(torch.searchsorted(keys.int(), bounds).int(), permutation, keys.numel())


def _map(layout: Layout, size: int, owners: bool) -> TileMap:
    num_tiles = layout.num_rows // size + layout.num_groups + 1
    tiles = layout.offsets.new_empty(3, num_tiles)
    owner = layout.offsets.new_empty(layout.num_rows // size + 1 if owners else 0)
    counts = layout.num_groups, layout.num_rows, num_tiles
    steps = layout.num_groups.bit_length() + 1
    grid = (triton.cdiv(num_tiles, _BLOCK),)
    map_tiles[grid](layout.offsets, tiles, owner, *counts, SIZE=size, STEPS=steps, BLOCK=_BLOCK, OWNERS=owners)
    return TileMap(size, tiles, owner)


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(tensor: Tensor, name: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What is made of a tensor, kept as long as the tensor lives and is not changed."""
    captures = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    version = 0 if tensor.is_inference() else tensor._version
    made = _kept.setdefault(tensor, {})
    # a replayed graph must map the rows of its own run: what was made outside is not used inside, nor the reverse
    key = *name, version, captures
    for other in [other for other in made if other[-2:] != (version, captures)]:
        del made[other]
    if key not in made:
        made[key] = make()
    return made[key]
