"""The two passes of a domain norm against loops over domains, by every engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import crossed
from torchrec_mdr.ops import cpu_kernels as rows
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups
from torchrec_mdr.ops.statistics import affine_by_domain, centered_sums

N = 5


ENGINES = ("rows-64", "rows-32", "rows-16", "torch")


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets compiled code do it, by the bytes of its vectors, or PyTorch's operators."""
    name, _, width = request.param.partition("-")
    if name == "torch":
        monkeypatch.setattr(rows, "is_supported", lambda x: False)
        return
    if not rows.is_supported(torch.empty(1)):
        pytest.skip("the compiled kernels are missing: run make setup with a C++ compiler")
    monkeypatch.setattr(rows, "VECTOR_BYTES", int(width))


def some_groups(kind: str) -> DomainGroups:
    ids = torch.tensor([4, 0, 3, 1]).repeat(40)[torch.randperm(160)]  # 2 is absent; more than a chunk
    if kind == "unsorted":
        return DomainGroups.from_ids(ids, N)
    if kind == "sorted":
        return DomainGroups.from_sorted_ids(ids.sort().values, N)
    other = torch.stack([torch.arange(160) // 30, ids], 1)  # several groups a domain
    other = other[(other @ torch.tensor([N, 1])).argsort()]
    return BatchDomains.from_sorted(other, (6, N)).groups[1]


@crossed(
    ("engine",),
    engine=ENGINES,
    dtype=[torch.float32, torch.float64],
    width=[1, 5, 37, 200],
    kind=["sorted", "unsorted", "combinations"],
    terms=["uv", "v", "u", "uv gated", "u gated", "v relu"],
)
def test_both_passes_are_loops_over_domains(
    dtype: torch.dtype, width: int, kind: str, terms: str, engine: None
) -> None:
    torch.manual_seed(0)
    groups = some_groups(kind)
    v, u, gate = torch.randn(160, width) + 3, torch.randn(160, width), torch.randn(160, width).relu()
    centre, table = torch.randn(N, width), torch.randn(N, 4, width)
    v, u, gate, centre, table = (tensor.to(dtype) for tensor in (v, u, gate, centre, table))
    names, _, behind = terms.partition(" ")
    own_u, own_v, own_gate = (
        u if "u" in names else None,
        v if "v" in names else None,
        gate if behind == "gated" else None,
    )
    found = centered_sums(own_u, v, centre, groups, own_gate)
    affine = affine_by_domain(own_u, own_v, table, groups, own_gate, relu=behind == "relu")

    sums, expected = torch.zeros(N, 2, width, dtype=torch.float64), torch.zeros(160, width, dtype=torch.float64)
    slopes = (gate > 0).double() if behind == "gated" else torch.ones(160, width, dtype=torch.float64)
    for row, domain in enumerate(groups.ids.tolist()):
        right = v[row].double() - centre[domain].double()
        left = u[row] * slopes[row] if "u" in names else right
        sums[domain] += torch.stack([left, left * right])
        a, b, c, e = table[domain].double()
        expected[row] = e + a * u[row] * slopes[row] * ("u" in names) + b * (v[row] - c) * ("v" in names)
    if behind == "relu":
        assert (expected < -0.1).any()
        expected = expected.relu()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.double(), sums, **tolerance)
    torch.testing.assert_close(affine.double(), expected, **tolerance)
    assert found.dtype == affine.dtype == dtype


def test_a_relu_hides_no_nan() -> None:
    groups = some_groups("sorted")
    v, table = torch.randn(160, 37), torch.randn(N, 4, 37)
    v[7, 3] = v[9, 36] = float("nan")
    y = affine_by_domain(None, v, table, groups, relu=True)
    assert y.isnan().nonzero().tolist() == [[7, 3], [9, 36]]
    gate = torch.ones(160, 37)
    assert affine_by_domain(v, None, table, groups, gate).isnan().nonzero().tolist() == [[7, 3], [9, 36]]


def test_rows_of_strides_of_their_own() -> None:
    torch.manual_seed(0)
    groups = some_groups("unsorted")
    wide: Tensor = torch.randn(160, 90)
    v, centre = wide[:, 10:50], torch.randn(N, 40)
    torch.testing.assert_close(
        centered_sums(None, v, centre, groups), centered_sums(None, v.contiguous(), centre, groups)
    )
    table = torch.randn(N, 4, 40)
    torch.testing.assert_close(
        affine_by_domain(v, wide.mT[:40].mT, table, groups), affine_by_domain(v, wide[:, :40], table, groups)
    )


@pytest.mark.parametrize("terms", ["u", "v", "u gated"])
def test_groups_that_several_threads_share(terms: str) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([0] * 1700 + [1] * 3 + [4] * 515)  # blocks of 512 rows, and what is left of them
    groups, width = DomainGroups.from_sorted_ids(ids, N), 530  # columns are summed 512 at a time
    v, u, gate = torch.randn(len(ids), width) + 3, torch.randn(len(ids), width), torch.randn(len(ids), width).relu()
    centre = torch.randn(N, width)
    found = centered_sums(None if terms == "v" else u, v, centre, groups, gate if terms == "u gated" else None)
    right = v.double() - centre.double()[ids]
    left = {"v": right, "u": u.double(), "u gated": u.double() * (gate > 0)}[terms]
    expected = torch.zeros(N, 2, width, dtype=torch.float64).index_add_(0, ids, torch.stack([left, left * right], 1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
