"""Rows in all orders, and what kernels must give for them, row by row in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

N = 5  # adapters, of which 2 has no rows
KINDS = ["sorted", "unsorted", "missing", "combinations", "missing combinations"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest number of a result


def rows_in(kind: str, count: int) -> DomainGroups:
    """Rows of adapters of many rows and of few: in order or not, some without an adapter, several groups an adapter."""
    torch.manual_seed(count)
    ids = torch.tensor([0, 0, 0, 0, 1, 3, 4, 4])[torch.randint(8, (count,))]
    if kind == "sorted":
        return DomainGroups.from_sorted_ids(ids.sort().values, N)
    missing = torch.rand(count) < 0.3
    if kind in ("unsorted", "missing"):
        return DomainGroups.from_ids(torch.where(missing & (kind == "missing"), -1, ids), N)
    other = torch.stack([torch.arange(count) // 13, ids], 1)
    other = other[(other @ torch.tensor([N, 1])).argsort()]
    groups = BatchDomains.from_sorted(other, (count // 13 + 1, N)).groups[1]
    if kind == "combinations":
        return groups
    assert groups.adapter_ids is not None
    owners = torch.where(groups.adapter_ids == 4, -1, groups.adapter_ids)
    return DomainGroups(torch.where(groups.ids == 4, -1, groups.ids), groups.offsets, N, owners, may_miss=True)


def own(table: Tensor, groups: DomainGroups) -> Tensor:
    """Each row's own part of a table [N, ...], in float64; zero without an adapter."""
    known = (groups.ids >= 0).view(-1, *(1 for _ in table.shape[1:]))
    return torch.where(known, table.double()[groups.ids.clamp(min=0)], 0.0)


def sums(rows: Tensor, groups: DomainGroups) -> Tensor:
    """The sum of each adapter's rows [B, ...], in float64."""
    count = groups.num_adapters
    total = rows.new_zeros(count + 1, *rows.shape[1:], dtype=torch.float64)
    return total.index_add_(0, torch.where(groups.ids < 0, count, groups.ids), rows.double())[:-1]


def check(ours: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """Compares with what float64 gives, by the largest number of the result; NaN is as wrong as can be."""
    assert ours.shape == wanted.shape
    limit = TOLERANCES[ours.dtype] if tolerance is None else tolerance
    if ours.numel():
        error = float((ours.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        assert error <= limit, f"error {error:.1e} of the largest"
