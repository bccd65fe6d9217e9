"""The products of :mod:`torchrec_mdr.adapters.kernels` on CPU, by our own compiled code.

``rows_kernels.h`` computes, ``rows.cpp`` is the module. It serves groups of one row as well as groups of thousands, and
takes rows where they lie, sorted or not. It is built when the package is installed, where there is a C++ compiler;
without, kernels.py goes on with PyTorch's own operators.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torchrec_mdr.adapters.groups import DomainGroups

try:
    from torchrec_mdr.adapters import _rows
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
_DOWN, _UP, _OUTER = range(3)


def serves(x: Tensor) -> bool:
    """Whether the compiled code is there and takes this tensor's type on its device."""
    return _rows is not None and x.device.type == "cpu" and x.dtype in DTYPES


def down(x: Tensor, table: Tensor, groups: DomainGroups) -> Tensor:
    """:func:`torchrec_mdr.adapters.kernels.down`."""
    z = x.new_empty(x.shape[0], table.shape[1])
    _run(_DOWN, x, table, None, z, groups, *table.shape[1:])
    return z


def up(z: Tensor, table: Tensor, groups: DomainGroups, start: Tensor | None) -> Tensor:
    """:func:`torchrec_mdr.adapters.kernels.up`."""
    y = z.new_empty(z.shape[0], table.shape[2])
    _run(_UP, z, table, start, y, groups, *table.shape[1:])
    return y


def outer(z: Tensor, x: Tensor, groups: DomainGroups) -> Tensor:
    """:func:`torchrec_mdr.adapters.kernels.outer` by groups: [G, r, width]."""
    total = x.new_empty(groups.offsets.numel(), z.shape[1], x.shape[1])
    _run(_OUTER, z, x, None, total, groups, z.shape[1], x.shape[1])
    return total


def _run(
    product: int,
    left: Tensor,
    right: Tensor,
    start: Tensor | None,
    out: Tensor,
    groups: DomainGroups,
    rank: int,
    width: int,
) -> None:
    num_rows = left.shape[0]
    if groups.ids.numel() != num_rows:
        raise ValueError(f"{num_rows} rows, but domains of {groups.ids.numel()}")
    left, right = _packed(left), _packed(right)
    start = None if start is None else _packed(start.expand(num_rows, -1))
    _rows.product(
        product,
        *(left.data_ptr(), left.stride(0)),
        *(right.data_ptr(), right.stride(0)),
        *((0, 0) if start is None else (start.data_ptr(), start.stride(0))),
        *(out.data_ptr(), out.stride(0)),
        *(0 if t is None else t.data_ptr() for t in (groups.permutation, groups.offsets, groups.adapter_ids)),
        *(groups.offsets.numel(), num_rows, rank, width),
        left.dtype == torch.float64,
        torch.get_num_threads(),
        VECTOR_BYTES,
    )


def _packed(tensor: Tensor) -> Tensor:
    """The tensor, contiguous but for its first stride."""
    *_, last = tensor.shape
    if tensor.stride(-1) == 1 and (tensor.dim() == 2 or tensor.stride(1) == last):
        return tensor
    return tensor.contiguous()
