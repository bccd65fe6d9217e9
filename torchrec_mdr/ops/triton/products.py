"""The products of :mod:`torchrec_mdr.ops.products` on CUDA: what launches their kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.triton import kernels, sizes
from torchrec_mdr.ops.triton.tile_map import Layout

_BLOCK = 256  # numbers of a sum of parts that a program takes


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What a kernel is given, which does not follow it where there is no tensor."""
    return other if tensor is None else tensor


def down(x: Tensor, table: Tensor, groups: DomainGroups, out: Tensor | None = None) -> Tensor:
    """:func:`torchrec_mdr.ops.products.down`."""
    (num_rows, width), rank = x.shape, table.shape[1]
    z = x.new_empty(num_rows, rank) if out is None else out
    if not num_rows:
        return z
    with on_device_of(x):
        layout = Layout.of(groups)
        tiles = layout.tiles(sizes.rows_of_tile(layout))
        many, deep = sizes.vectors(rank), sizes.depth(x, tiles.size)
        kernels.down[tiles.num_tiles, triton.cdiv(rank, many)](
            *(x, table, z, tiles.tiles, pointer(layout.permutation, x)),
            *(tiles.num_tiles, layout.num_groups, rank, width),
            *(*x.stride(), *table.stride(), *z.stride()),
            PRECISION=sizes.precision(x),
            PERMUTED=layout.permutation is not None,
            EVEN=width % deep == 0,
            BM=tiles.size,
            BR=many,
            BK=deep,
            num_stages=4,
        )
    return z


def up(
    z: Tensor,
    table: Tensor,
    groups: DomainGroups,
    start: Tensor | None = None,
    out: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """:func:`torchrec_mdr.ops.products.up`; out may be start, since what is read is written by the same program."""
    rank, width = table.shape[1:]
    y = z.new_empty(z.shape[0], width) if out is None else out
    if not z.shape[0]:
        return y
    with on_device_of(z):
        layout = Layout.of(groups)
        tiles = layout.tiles(sizes.rows_of_tile(layout))
        columns = sizes.columns(tiles.size, rank)
        kernels.up[tiles.num_tiles, triton.cdiv(width, columns)](
            *(z, table, pointer(start, z), pointer(last, z), y, tiles.tiles, pointer(layout.permutation, z)),
            *(tiles.num_tiles, layout.num_groups, rank, width),
            *(*z.stride(), *table.stride(), *_strides(start), *_strides(last), *y.stride()),
            PRECISION=sizes.precision(z),
            PERMUTED=layout.permutation is not None,
            START=0 if start is None else start.dim(),
            LAST=last is not None,
            BM=tiles.size,
            BR=sizes.vectors(rank),
            BN=columns,
        )
    return y


def outer(z: Tensor, x: Tensor, groups: DomainGroups) -> Tensor:
    """:func:`torchrec_mdr.ops.products.outer`, the same bits every time."""
    (num_rows, rank), width = z.shape, x.shape[1]
    out = x.new_empty(groups.num_adapters, rank, width)
    with on_device_of(x):
        layout = Layout.of(groups)
        size = sizes.rows_of_sum(layout)
        tiles = layout.tiles(size, owners=True)
        parts = new_parts(x, num_rows, size, rank * width)
        many, columns = sizes.vectors(rank), sizes.columns_of_sum(width)
        kernels.outer[tiles.num_tiles * triton.cdiv(width, columns), triton.cdiv(rank, many)](
            *(z, x, out, parts, tiles.tiles, pointer(layout.permutation, x), layout.offsets),
            *(tiles.num_tiles, layout.num_groups, rank, width, *z.stride(), *x.stride()),
            PRECISION=sizes.precision(x),
            PERMUTED=layout.permutation is not None,
            SIZE=size,
            BM=128 // x.element_size(),
            BR=many,
            BN=columns,
        )
        add_parts(parts, out, tiles.owners, layout, size)
    return out


def new_parts(x: Tensor, num_rows: int, size: int, numbers: int) -> Tensor:
    """Room for the parts of sums that several tiles give, float32 [P, numbers]; none where no group has several."""
    count = 2 * num_rows // size + 1 if num_rows > size else 0
    return torch.empty(count, numbers, dtype=torch.float32, device=x.device)


def add_parts(parts: Tensor, out: Tensor, owners: Tensor, layout: Layout, size: int) -> None:
    """Adds up what tiles of :func:`new_parts` hold, into out [N, ...]."""
    numbers = parts.shape[1]
    if parts.shape[0]:
        grid = owners.numel(), triton.cdiv(numbers, _BLOCK)
        kernels.add_parts[grid](
            parts, out, owners, layout.offsets, numbers, SIZE=size, BLOCK=_BLOCK, PARTS=32, num_warps=8
        )


def low_rank(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    weight: Tensor | None,
    linear_bias: Tensor | None,
    groups: DomainGroups,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`torchrec_mdr.ops.products.low_rank`; without a bias z is [B, r].

    Args:
        exact (bool): whether rows without an adapter must have the bits that ``F.linear`` gives.
    """
    num_rows, rank, last = x.shape[0], lora_A.shape[1], bias is not None
    z = x.new_empty(num_rows, rank + last)
    with on_device_of(x):
        layout = Layout.of(groups)
        if weight is not None and not (exact and groups.may_miss) and sizes.takes_layer(x, layout, rank):
            return _layer(x, weight, lora_A, lora_B.mT, bias, linear_bias, z, layout), z
        start = linear_bias if base is None else base
        y = None
        if weight is not None:
            start = y = F.linear(x, weight, linear_bias)
        if not sizes.takes_down_up(x, rank):
            z[:, rank:] = 1.0
            down(x, lora_A, groups, out=z[:, :rank])
            return up(z, lora_B.mT, groups, start, y, bias), z
        return _down_up(x, lora_A, lora_B.mT, bias, start, y, z, layout), z


def _down_up(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    last: Tensor | None,
    start: Tensor | None,
    out: Tensor | None,
    z: Tensor,
    layout: Layout,
) -> Tensor:
    (num_rows, in_width), rank, out_width = x.shape, lower.shape[1], upper.shape[2]
    y = x.new_empty(num_rows, out_width) if out is None else out
    if not num_rows:
        return y
    tiles = layout.tiles(sizes.rows_of_tile(layout))
    deep = sizes.depth(x, tiles.size)
    kernels.down_up[(tiles.num_tiles,)](
        *(x, lower, upper, pointer(start, x), pointer(last, x), y, z, tiles.tiles, pointer(layout.permutation, x)),
        *(tiles.num_tiles, layout.num_groups, rank, in_width, out_width),
        *(*x.stride(), *lower.stride(), *upper.stride(), *_strides(start), *_strides(last), *y.stride(), z.stride(0)),
        PRECISION=sizes.precision(x),
        PERMUTED=layout.permutation is not None,
        START=0 if start is None else start.dim(),
        LAST=last is not None,
        EVEN=in_width % deep == 0,
        BM=tiles.size,
        BR=sizes.vectors(rank),
        BK=deep,
        BN=sizes.columns(tiles.size, rank),
        num_stages=4,
    )
    return y


def _layer(
    x: Tensor,
    weight: Tensor,
    lower: Tensor,
    upper: Tensor,
    last: Tensor | None,
    start: Tensor | None,
    z: Tensor,
    layout: Layout,
) -> Tensor:
    (num_rows, in_width), rank, out_width = x.shape, lower.shape[1], upper.shape[2]
    y = x.new_empty(num_rows, out_width)
    if x.dtype is torch.float32:
        weight = weight.contiguous()  # tensor cores take TF32 along columns alone
    tiles, deep = layout.tiles(sizes.LAYER_ROWS), sizes.depth(x, sizes.LAYER_ROWS)
    columns = sizes.columns_of_layer(out_width, rank)
    kernels.layer[(tiles.num_tiles * triton.cdiv(out_width, columns),)](
        *(x, weight, lower, upper, pointer(start, x), pointer(last, x)),
        *(y, z, tiles.tiles, pointer(layout.permutation, x)),
        *(tiles.num_tiles, layout.num_groups, rank, in_width, out_width),
        *(*x.stride(), *weight.stride(), *lower.stride(), *upper.stride(), _strides(start)[1], *_strides(last)),
        *(*y.stride(), z.stride(0)),
        PRECISION=sizes.precision(x),
        PERMUTED=layout.permutation is not None,
        START=0 if start is None else start.dim(),
        LAST=last is not None,
        EVEN=in_width % deep == 0,
        BM=tiles.size,
        BR=sizes.vectors(rank),
        BK=deep,
        BN=columns,
        num_warps=8,
        num_stages=3,
    )
    return y


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Of a matrix, of a row, which has no next one, or of nothing."""
    if tensor is None:
        return 0, 0
    return (0, tensor.stride(0)) if tensor.dim() == 1 else (tensor.stride(0), tensor.stride(1))
