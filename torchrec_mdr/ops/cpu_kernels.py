"""The products of :mod:`torchrec_mdr.ops.products` on CPU, by our own compiled code.

``rows_kernels.h`` computes, ``rows.cpp`` is the module. It serves groups of one row as well as groups of thousands, and
takes rows where they lie, sorted or not. It is built when the package is installed, where there is a C++ compiler;
without, products.py goes on with PyTorch's own operators.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torchrec_mdr.ops.groups import DomainGroups

try:
    from torchrec_mdr.ops import _rows
except ImportError:
    _rows = None  # type: ignore[assignment]
    if not torch.cuda.is_available():
        warnings.warn(
            "torchrec_mdr's compiled kernels are missing, adapters will be slow on CPU: install a C++ compiler, then "
            "the package again (pip install .)",
            stacklevel=2,
        )

DTYPES = (torch.float32, torch.float64)
VECTOR_BYTES = 64  # the widest vectors to use, of those that the processor has
_DOWN, _UP, _OUTER, _AFFINE, _SUMS = range(5)
# which operands of each have a row for each of the batch's
_OF_ROWS = ((0, 5), (0, 2, 5), (0, 1), (0, 1, 3, 5), (0, 1, 3))


def is_supported(x: Tensor) -> bool:
    """Whether the compiled code is there and takes this tensor's type on its device."""
    if _rows is None or isinstance(x, torch.fx.Proxy):
        return False
    return x.device.type == "cpu" and x.dtype in DTYPES


def down(x: Tensor, table: Tensor, groups: DomainGroups, out: Tensor | None = None) -> Tensor:
    """:func:`torchrec_mdr.ops.products.down`."""
    z = x.new_empty(x.shape[0], table.shape[1]) if out is None else out
    _run(_DOWN, (x, table, None, None, None, z), groups, *table.shape[1:])
    return z


def up(
    z: Tensor,
    table: Tensor,
    groups: DomainGroups,
    start: Tensor | None = None,
    out: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """:func:`torchrec_mdr.ops.products.up`; out may be start, since a row is read before it is written."""
    y = z.new_empty(z.shape[0], table.shape[2]) if out is None else out
    start = None if start is None else start.expand(z.shape[0], -1)
    _run(_UP, (z, table, start, None, last, y), groups, *table.shape[1:])
    return y


def outer(z: Tensor, x: Tensor, groups: DomainGroups) -> Tensor:
    """:func:`torchrec_mdr.ops.products.outer` by groups: [G, r, width]."""
    total = x.new_empty(groups.offsets.numel(), z.shape[1], x.shape[1])
    _run(_OUTER, (z, x, None, None, None, total), groups, z.shape[1], x.shape[1])
    return total


def affine_by_domain(
    u: Tensor | None, v: Tensor | None, table: Tensor, groups: DomainGroups, gate: Tensor | None, relu: bool
) -> Tensor:
    """:func:`torchrec_mdr.ops.statistics.affine_by_domain`."""
    y = table.new_empty(groups.ids.numel(), table.shape[2])
    _run(_AFFINE, (u, v, table, gate, None, y), groups, 4, y.shape[1], relu or gate is not None)
    return y


def centered_sums(u: Tensor | None, v: Tensor, centre: Tensor, groups: DomainGroups, gate: Tensor | None) -> Tensor:
    """:func:`torchrec_mdr.ops.statistics.centered_sums` by groups: [G, 2, F]."""
    total = v.new_empty(groups.offsets.numel(), 2, v.shape[1])
    _run(_SUMS, (u, v, centre, gate, None, total), groups, 2, v.shape[1], gate is not None)
    return total


def _run(
    product: int,
    operands: tuple[Tensor | None, ...],  # left, right, start, gate, last and what is written, as in rows_call.h
    groups: DomainGroups,
    rank: int,
    width: int,
    relu: bool = False,
) -> None:
    *_, out = operands
    assert out is not None and row_contiguous(out) is out, "what is written would be a copy"
    dtype, num_rows = out.dtype, groups.ids.numel()
    kept: list[Tensor] = []  # as long as their addresses are in use
    addresses: list[int] = []
    for place, tensor in enumerate(operands):
        if tensor is None:
            addresses += (0, 0)
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"rows and tables are of {[t.dtype for t in operands if t is not None]}, not of one type")
        if place in _OF_ROWS[product] and tensor.shape[0] != num_rows:
            raise ValueError(f"{tensor.shape[0]} rows, but the domains of {num_rows}")
        kept.append(tensor if tensor.is_contiguous() else row_contiguous(tensor))
        addresses += (kept[-1].data_ptr(), kept[-1].stride(0))
    permutation, adapters = groups.permutation, groups.adapter_ids
    _rows.product(
        product,
        *addresses,
        0 if permutation is None else permutation.data_ptr(),
        groups.offsets.data_ptr(),
        0 if adapters is None else adapters.data_ptr(),
        *(groups.offsets.numel(), num_rows, rank, width),
        *(relu, dtype == torch.float64),
        torch.get_num_threads(),
        VECTOR_BYTES,
    )


def row_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, contiguous but for its first stride."""
    *_, last = tensor.shape
    if tensor.stride(-1) == 1 and (tensor.dim() == 2 or tensor.stride(1) == last):
        return tensor
    return tensor.contiguous()
