"""The products that adapters are made of, of rows with their own domain's small table, and what computes each best.

A table is [N, r, width]: r vectors for each adapter. Down takes a row's inner products with its adapter's vectors, up
sums the vectors with a row's weights, outer adds up what a table's gradient is made of. Together they are the forward
and the backward pass of every adapter. Four engines compute them, chosen by type and device alone, so that nothing
waits for the device:

- rows (CPU, float32 and float64): our own compiled code. Best throughout: it moves no rows, be they sorted or not, and
  small groups cost little more than large ones.
- triton (CUDA, all but float64): our own kernels; the same bits every time.
- grouped_mm: a product per group in one call, for bfloat16 on CUDA without Triton and for what rows does not serve on
  CPU.
- tiles: batched products of rows cut into tiles of one group each, for types that the others do not take (float64 on
  CUDA, say).

Where rows does not serve, one adapter of all rows is an ordinary product. Triton is imported where it is first needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_mdr.ops import cpu_kernels as compiled
from torchrec_mdr.ops import triton
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.tiles import Tiles

_ALIGNMENT_BYTES = 16  # of every stride that grouped_mm reads
KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}


def grouped_mm_supports(x: Tensor) -> bool:
    """Whether grouped_mm takes this tensor's type on its device."""
    return x.dtype in KERNEL_DTYPES.get(x.device.type, ())


def align(tensor: Tensor, dim: int = -1) -> Tensor:
    """Zero-pads the last dimension, or the one before, to the grouped kernel's alignment; contiguous."""
    step = _ALIGNMENT_BYTES // tensor.element_size()
    missing = -tensor.shape[dim] % step
    if missing == 0:
        return tensor.contiguous()
    return F.pad(tensor, (0, missing) if dim == -1 else (0, 0, 0, missing))


def down(x: Tensor, table: Tensor, groups: DomainGroups, out: Tensor | None = None) -> Tensor:
    """``z_ij = table[d_i, j] . x_i``.

    Args:
        x (Tensor): [B, width], rows in the batch's order.
        table (Tensor): [N, r, width].
        groups (DomainGroups): the adapter d_i of each row.
        out (Tensor | None): [B, r], where to write z; its rows may lie apart.

    Returns:
        Tensor: [B, r], rows in x's order.
    """
    if compiled.is_supported(x):
        return compiled.down(x, table, groups, out)
    if groups.num_adapters > 1 and triton.is_supported(x):
        from torchrec_mdr.ops.triton import products as triton_products

        return triton_products.down(x, table, groups, out)
    known, groups = groups.ids >= 0, groups.with_all_rows()
    rows = groups.group(x)
    if groups.num_adapters == 1:
        z = rows @ table[0].mT
    elif grouped_mm_supports(x):
        z = matmul(rows, _of_groups(table, groups), groups.offsets)
    else:
        tiles, owners = _tiles(groups, x.shape[0])
        z = tiles.collect(torch.bmm(tiles.spread(rows), table.index_select(0, owners).mT))
    z = groups.ungroup(z)
    z = torch.where(known.unsqueeze(1), z, 0.0) if groups.may_miss else z
    return z if out is None else out.copy_(z)


def up(
    z: Tensor,
    table: Tensor,
    groups: DomainGroups,
    start: Tensor | None = None,
    out: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """``y_i = start_i + sum_j z_ij table[d_i, j]``.

    Args:
        z (Tensor): [B, r], rows in the batch's order.
        table (Tensor): [N, r, width].
        groups (DomainGroups): the adapter d_i of each row.
        start (Tensor | None): [B, width], or [width] for all rows; zero where left out.
        out (Tensor | None): [B, width], where to write y, start itself if wanted; its rows may lie apart.
        last (Tensor | None): [N, width], one more vector of each adapter, which the last column of z [B, r + 1] weighs.

    Returns:
        Tensor: [B, width], rows in z's order; without out a tensor of its own.
    """
    if compiled.is_supported(z):
        return compiled.up(z, table, groups, start, out, last)
    if groups.num_adapters > 1 and triton.is_supported(z):
        from torchrec_mdr.ops.triton import products as triton_products

        return triton_products.up(z, table, groups, start, out, last)
    if last is not None:
        table = torch.cat([table, last.unsqueeze(1)], 1)
    known, groups = groups.ids >= 0, groups.with_all_rows()
    rows = groups.group(z)
    if groups.num_adapters == 1:
        y = rows @ table[0]
    elif grouped_mm_supports(z):
        y = matmul(rows, _of_groups(table, groups).mT, groups.offsets)
    else:
        tiles, owners = _tiles(groups, z.shape[0])
        y = tiles.collect(torch.bmm(tiles.spread(rows), table.index_select(0, owners)))
    y = groups.ungroup(y)
    y = torch.where(known.unsqueeze(1), y, 0.0) if groups.may_miss else y
    y = y if start is None else y.add_(start)
    return y if out is None else out.copy_(y)


def outer(z: Tensor, x: Tensor, groups: DomainGroups) -> Tensor:
    """``g_dj = sum of z_ij x_i over the rows i of adapter d``: the gradient of a table.

    Args:
        z (Tensor): [B, r].
        x (Tensor): [B, width].
        groups (DomainGroups): the adapter d_i of each row, N of them.

    Returns:
        Tensor: [N, r, width].
    """
    rank, width = z.shape[1], x.shape[1]
    if compiled.is_supported(x):
        return of_adapters(compiled.outer(z, x, groups), groups)
    if groups.num_adapters > 1 and triton.is_supported(x):
        from torchrec_mdr.ops.triton import products as triton_products

        return triton_products.outer(z, x, groups)
    if groups.may_miss:
        z, groups = torch.where((groups.ids >= 0).unsqueeze(1), z, 0.0), groups.with_all_rows()
    if groups.num_adapters == 1:
        return (z.mT @ x).unsqueeze(0)
    z, x = groups.group(z), groups.group(x)
    if grouped_mm_supports(x):
        return of_adapters(matmul_outer(z, x, groups.offsets), groups)
    tiles, owners = _tiles(groups, x.shape[0])
    total = torch.bmm(tiles.spread(z).mT, tiles.spread(x))
    return total.new_zeros(groups.num_adapters, rank, width).index_add_(0, owners, total)


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
    """``base_i``, or ``weight x_i + linear_bias``, plus ``lora_B[d_i] lora_A[d_i] x_i + bias[d_i]``, in one buffer.

    Args:
        x (Tensor): [B, in_features].
        lora_A (Tensor): [N, r, in_features].
        lora_B (Tensor): [N, out_features, r].
        bias (Tensor | None): [N, out_features].
        base (Tensor | None): [B, out_features].
        weight (Tensor | None): [out_features, in_features], of a layer; without base.
        linear_bias (Tensor | None): [out_features], of that layer.
        groups (DomainGroups): the adapter d_i of each row.
        exact (bool): whether rows without an adapter must have the bits that the layer alone gives, on CUDA, too.

    Returns:
        tuple: y [B, out_features]; z [B, r + 1], ``lora_A[d_i] x_i`` and one, which the bias is multiplied by, or
        [B, r] without a bias.
    """
    if in_one_call(x):
        from torchrec_mdr.ops.triton import products as triton_products

        return triton_products.low_rank(x, lora_A, lora_B, bias, base, weight, linear_bias, groups, exact)
    rank = lora_A.shape[1]
    z = x.new_ones(x.shape[0], rank + (bias is not None))
    down(x, lora_A, groups, out=z[:, :rank])
    y = up(z, lora_B.mT, groups, linear_bias if base is None else base, last=bias)
    return y if weight is None else y.addmm_(x, weight.mT), z


def matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``y_i = weight[g_i] x_i`` for grouped rows, of a type that grouped_mm takes.

    Args:
        x (Tensor): [R, in_features].
        weight (Tensor): [G, out_features, in_features]; it or its transpose contiguous, or it is copied.
        offsets (Tensor): int32 [G], the exclusive end of each group.

    Returns:
        Tensor: [R, out_features].
    """
    if weight.mT.is_contiguous():
        table = align(align(weight.mT), -2)
    else:
        table = align(align(weight), -2).mT
    return F.grouped_mm(align(x), table, offs=offsets)[:, : weight.shape[1]].contiguous()


def matmul_outer(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """The sum of ``y_i x_i^T`` over the rows of each group: the gradient of :func:`matmul`'s weight.

    Args:
        y (Tensor): [R, out_features].
        x (Tensor): [R, in_features].
        offsets (Tensor): int32 [G].

    Returns:
        Tensor: [G, out_features, in_features].
    """
    total = F.grouped_mm(align(y).mT, align(x), offs=offsets)
    return total[:, : y.shape[1], : x.shape[1]].contiguous()


def in_one_call(x: Tensor) -> bool:
    """Whether :func:`low_rank` is more than its parts: whether down and up share a pass over rows."""
    return not compiled.is_supported(x) and triton.is_supported(x)


def sum_rows(x: Tensor, groups: DomainGroups) -> Tensor:
    """Sums the rows [B, width] of each adapter -> [N, width]."""
    if groups.num_adapters == 1:
        return x.sum(0, keepdim=True)
    places = groups.permutation
    if places is None:
        places = torch.arange(x.shape[0], device=x.device)
    starts = F.pad(groups.offsets[:-1], (1, 0)).long()
    return of_adapters(F.embedding_bag(places, x.detach().contiguous(), starts, mode="sum"), groups)


def count_rows(groups: DomainGroups) -> Tensor:
    """How many rows each adapter has, int32 [N]."""
    return of_adapters(torch.diff(groups.offsets, prepend=groups.offsets.new_zeros(1)), groups)


def _of_groups(table: Tensor, groups: DomainGroups) -> Tensor:
    """A table a group: the tiny weights follow the groups, so that no activation has to move."""
    return table if groups.adapter_ids is None else table.index_select(0, groups.adapter_ids)


def of_adapters(total: Tensor, groups: DomainGroups) -> Tensor:
    """Sums of groups [G, ...] -> sums of adapters [N, ...]."""
    owners = groups.adapter_ids
    if owners is None:
        return total
    if not groups.may_miss:
        return total.new_zeros(groups.num_adapters, *total.shape[1:]).index_add_(0, owners, total)
    sums = total.new_zeros(groups.num_adapters + 1, *total.shape[1:])  # the last of groups without an adapter
    return sums.index_add_(0, torch.where(owners < 0, groups.num_adapters, owners), total)[:-1]


def _tiles(groups: DomainGroups, num_rows: int) -> tuple[Tiles, Tensor]:
    """Tiles of the grouped rows, and the adapter of each tile."""
    tiles = Tiles.of(groups.offsets, num_rows)
    owners = tiles.groups if groups.adapter_ids is None else groups.adapter_ids.index_select(0, tiles.groups)
    return tiles, owners
