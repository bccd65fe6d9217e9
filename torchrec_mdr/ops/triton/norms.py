"""The passes of :mod:`torchrec_mdr.ops.statistics` on CUDA: what launches their kernels."""

from __future__ import annotations

import triton
from torch import Tensor

from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.triton import norm_kernels, sizes
from torchrec_mdr.ops.triton.products import add_parts, new_parts, on_device_of, pointer
from torchrec_mdr.ops.triton.tile_map import Layout

_COLUMNS = 64  # that a program takes


def centered_sums(
    u: Tensor | None, v: Tensor, centre: Tensor, groups: DomainGroups, gate: Tensor | None = None
) -> Tensor:
    """:func:`torchrec_mdr.ops.statistics.centered_sums`, the same bits every time."""
    num_rows, width = v.shape
    out = v.new_empty(groups.num_adapters, 2, width)
    with on_device_of(v):
        layout = Layout.of(groups)
        size = sizes.rows_of_sum(layout)
        tiles = layout.tiles(size, owners=True)
        parts = new_parts(v, num_rows, size, 2 * width)
        left, slope, places = pointer(u, v), pointer(gate, v), pointer(layout.permutation, v)
        norm_kernels.centered_sums[(tiles.num_tiles * triton.cdiv(width, _COLUMNS),)](
            *(left, v, centre, slope, out, parts, tiles.tiles, places, layout.offsets),
            *(tiles.num_tiles, layout.num_groups, width),
            *(*left.stride(), *v.stride(), *centre.stride(), *slope.stride()),
            LEFT=u is not None,
            GATED=gate is not None and u is not None,
            PERMUTED=layout.permutation is not None,
            SIZE=size,
            BM=32,
            BN=_COLUMNS,
        )
        add_parts(parts, out, tiles.owners, layout, size)
    return out


def affine_by_domain(
    u: Tensor | None,
    v: Tensor | None,
    table: Tensor,
    groups: DomainGroups,
    gate: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """:func:`torchrec_mdr.ops.statistics.affine_by_domain`."""
    num_rows, width = groups.ids.numel(), table.shape[2]
    y = table.new_empty(num_rows, width)
    if not num_rows:
        return y
    with on_device_of(table):
        layout = Layout.of(groups)
        tiles = layout.tiles(sizes.rows_of_tile(layout))
        left, right, slope, places = pointer(u, y), pointer(v, y), pointer(gate, y), pointer(layout.permutation, y)
        norm_kernels.affine_by_domain[(tiles.num_tiles * triton.cdiv(width, _COLUMNS),)](
            *(left, right, table, slope, y, tiles.tiles, places, tiles.num_tiles, layout.num_groups, width),
            *(*left.stride(), *right.stride(), *table.stride(), *slope.stride(), y.stride(0)),
            LEFT=u is not None,
            RIGHT=v is not None,
            GATED=gate is not None and u is not None,
            RELU=relu,
            PERMUTED=layout.permutation is not None,
            BM=tiles.size,
            BN=_COLUMNS,
        )
    return y
