"""Grouped rows in tiles of one length, for products that no grouped kernel serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TILE_ROWS = (16, 128)  # fewest and most rows of a tile


@dataclass(frozen=True)
class Tiles:
    """Grouped rows cut into pieces of one length, each of one group and padded with empty rows.

    Their number follows from the number of rows and groups alone, so nothing waits for the device; some may stay empty.

    Args:
        size (int): rows of a tile.
        slots (Tensor): int64 [R], the place of each grouped row among the rows of all tiles.
        groups (Tensor): int64 [M], the group of each tile.

    Example::

        >>> tiles = Tiles.of(torch.tensor([17, 17, 20]), 20)
        >>> tiles.size, tiles.groups.tolist()
        (16, [0, 0, 2, 2])
    """

    size: int
    slots: Tensor
    groups: Tensor

    @staticmethod
    def of(offsets: Tensor, num_rows: int) -> Tiles:
        """Cuts rows into tiles.

        Args:
            offsets (Tensor): integers [G], the exclusive end of each group among the grouped rows.
            num_rows (int): R, the last of offsets.
        """
        ends = offsets.long()
        num_groups = ends.numel()
        size = min(max(num_rows // num_groups, TILE_ROWS[0]), TILE_ROWS[1])
        starts = F.pad(ends[:-1], (1, 0))
        needed = (ends - starts + size - 1) // size
        tile_ends = needed.cumsum(0)
        rows = torch.arange(num_rows, device=ends.device)
        group = torch.searchsorted(ends, rows, right=True)
        slots = (tile_ends - needed)[group] * size + rows - starts[group]
        tiles = torch.arange(num_rows // size + num_groups, device=ends.device)
        return Tiles(size, slots, torch.searchsorted(tile_ends, tiles, right=True).clamp(max=num_groups - 1))

    def spread(self, rows: Tensor) -> Tensor:
        """Grouped rows [R, ...] -> [M, size, ...], zeros where there is no row."""
        tiles = rows.new_zeros(self.groups.numel() * self.size, *rows.shape[1:])
        return tiles.index_copy(0, self.slots, rows).unflatten(0, (-1, self.size))

    def collect(self, tiles: Tensor) -> Tensor:
        """[M, size, ...] -> grouped rows [R, ...]."""
        return tiles.flatten(0, 1).index_select(0, self.slots)
