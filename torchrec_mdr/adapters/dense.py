"""Full-size layers per domain: the grouped linear product, and tiles for every other kind of layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchrec_mdr.adapters.groups import DomainGroups
from torchrec_mdr.adapters.product import align, kernel_serves

TILE_ROWS = (16, 128)  # fewest and most rows of a tile


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: DomainGroups) -> Tensor:
    """``y_i = weight[d_i] x_i + bias[d_i]`` for rows i with adapters d_i: a full-size linear layer per domain.

    Each group of rows is multiplied by its own matrix in one kernel over all groups: the cost is that of one linear
    layer over the batch, whatever the number of domains. Where the kernel does not serve the type (float64, and float32
    on CUDA) the rows are cut into tiles of one domain each, and the tiles multiplied as a batch.

    Args:
        x (Tensor): [B, ..., in_features]; a row's domain is that of its first index.
        weight (Tensor): [N, out_features, in_features].
        bias (Tensor | None): [N, out_features].
        groups (DomainGroups): the adapter of each row, N = groups.num_adapters.

    Returns:
        Tensor: [B, ..., out_features], rows in x's order.

    Example::

        >>> groups = DomainGroups.from_ids(torch.tensor([1, 0]), 2)
        >>> weight = torch.tensor([[[1.0, 1.0]], [[5.0, 5.0]]])
        >>> grouped_linear(torch.eye(2), weight, torch.tensor([[0.0], [0.5]]), groups).tolist()
        [[5.5], [1.0]]
    """
    if groups.adapter_ids is not None:  # the weights follow the groups, so that no activation has to move
        weight = weight.index_select(0, groups.adapter_ids)
    inner = x.shape[1:-1]
    rows, offsets = groups.group(x).flatten(0, -2), groups.offsets * inner.numel()
    weight = weight.to(x.dtype)
    if kernel_serves(x) and x.shape[-1]:
        y: Tensor = _GroupedLinear.apply(rows, weight, offsets)
    else:
        tiles = Tiles.of(offsets, rows.shape[0])
        y = tiles.collect(torch.bmm(tiles.spread(rows), weight.index_select(0, tiles.groups).mT))
    y = groups.ungroup(y.view(x.shape[0], *inner, weight.shape[1]))
    if bias is None:
        return y
    own = bias.to(x.dtype).index_select(0, groups.ids)
    return y + own.view(own.shape[0], *(1 for _ in inner), own.shape[1])


class _GroupedLinear(torch.autograd.Function):
    """The product of grouped rows [R, in] and matrices [G, out, in], on operands padded to the kernel's alignment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.sizes = weight.shape[1:]
        x, weight = align(x), align(align(weight), -2)
        ctx.save_for_backward(x, weight, offsets)
        return F.grouped_mm(x, weight.mT, offs=offsets)[:, : ctx.sizes[0]].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        out_features, in_features = ctx.sizes
        grad = align(grad)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad, weight, offs=offsets)[:, :in_features]
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad.mT, x, offs=offsets)[:, :out_features, :in_features]
        return grad_x, grad_weight, None


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
