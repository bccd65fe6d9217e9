"""The passes of domain norms against rows in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cases import crossed
from tests.ops.kernels.rows import DTYPES, KINDS, N, check, own, rows_in, sums
from torchrec_mdr.ops.statistics import affine_by_domain, centered_sums

TERMS = ["uv", "v", "u", "uv gated", "u gated", "v relu", ""]


@crossed(dtype=DTYPES, kind=KINDS, size=[(50, 70), (130, 5), (1, 1), (0, 3), (40, 16)], terms=TERMS)
def test_both_passes(dtype: torch.dtype, kind: str, size: tuple[int, int], terms: str) -> None:
    torch.manual_seed(0)
    groups = rows_in(kind, size[0])
    u, v, gate = torch.randn(size).to(dtype), torch.randn(size).to(dtype) + 3, torch.randn(size).relu().to(dtype)
    centre, table = torch.randn(N, size[1]).to(dtype) + 3, torch.randn(N, 4, size[1]).to(dtype)
    names, _, behind = terms.partition(" ")
    left: Tensor | None = u.mT.contiguous().mT if "u" in names else None
    right, slope = v if "v" in names else None, gate if behind == "gated" else None
    counted = None if left is None else left.double() * ((gate > 0) if slope is not None else 1.0)
    y = affine_by_domain(left, right, table, groups, slope, behind == "relu")
    a, b, c, e = own(table, groups).unbind(1)
    wanted = e + (0.0 if counted is None else a * counted) + (0.0 if right is None else b * (right.double() - c))
    check(y, wanted.relu() if behind == "relu" else wanted)
    if right is None:
        return
    moved = right.double() - own(centre, groups)
    counted = moved if counted is None else counted
    ours = centered_sums(left, right, centre, groups, slope)
    check(ours, torch.stack([sums(counted, groups), sums(counted * moved, groups)], 1))
