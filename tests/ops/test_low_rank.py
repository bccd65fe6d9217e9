"""The grouped low-rank product against a loop over rows, by every engine that can compute it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.cases import crossed
from tests.helpers import CountOps, low_rank_rows
from tests.ops.conftest import ENGINES, each_kind_of_engine
from torchrec_mdr.ops import cpu_kernels as rows
from torchrec_mdr.ops import products as kernels
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups
from torchrec_mdr.ops.low_rank import LinearWeights, grouped_low_rank

N = 5


def weights(n: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """lora_A, lora_B and bias, lying in memory as a bank's do."""
    parts = [torch.randn(n, rank, in_features), torch.randn(n, rank, out_features).mT, torch.randn(n, out_features)]
    return [part.to(dtype).requires_grad_() for part in parts]


def compare(x: Tensor, parts: list[Tensor], groups: DomainGroups, base: Tensor | None, tolerance: float) -> None:
    """Outputs and all gradients, against the row loop in float64."""
    leaves = [x, *parts] if base is None else [x, *parts, base]
    y = grouped_low_rank(x, *parts, groups, base)
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, weight)

    slow = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = low_rank_rows(*slow[:4], groups.ids)
    if base is not None:
        expected = expected + slow[4]
    wanted = torch.autograd.grad(expected, slow, weight.double())

    assert y.shape == (x.shape[0], parts[2].shape[1]) and y.dtype == x.dtype
    for ours, theirs in zip([y, *gradients], [expected, *wanted], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@crossed(
    ("engine",),
    engine=ENGINES,
    widths=[(113, 5), (5, 3), (3, 113), (16, 8)],
    rank=[1, 2, 7, 8],
    rows_sorted=[True, False],
    with_base=[True, False],
)
def test_equals_the_row_loop(
    widths: tuple[int, int], rank: int, rows_sorted: bool, with_base: bool, engine: str
) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([4, 0, 0, 3, 4, 1, 3, 3, 0, 4, 1])  # domain 2 is absent
    if rows_sorted:
        groups = DomainGroups.from_sorted_ids(ids.sort().values, N)
    else:
        groups = DomainGroups.from_ids(ids, N)
    x = torch.randn(len(ids), widths[0], requires_grad=True)
    base = torch.randn(len(ids), widths[1], requires_grad=True) if with_base else None
    compare(x, weights(N, *widths, rank), groups, base, 1e-4)


@crossed(("engine",), engine=ENGINES, domains=[1, 7, 40], rows_sorted=[True, False], threads=[1, 3])
def test_equals_the_row_loop_where_work_is_cut_up(domains: int, rows_sorted: bool, threads: int, engine: str) -> None:
    """More rows than a chunk, more columns than a tile, work for more than one thread, and what is left of each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        ids = torch.randint(domains, (101,))
        groups = DomainGroups.from_ids(ids, domains)
        if rows_sorted:
            groups = DomainGroups.from_sorted_ids(ids.sort().values, domains)
        x, base = torch.randn(101, 141, requires_grad=True), torch.randn(101, 75, requires_grad=True)
        compare(x, weights(domains, 141, 75, 9), groups, base, 1e-4)
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    groups = DomainGroups.from_ids(torch.randint(7, (301,)), 7)
    x, z, table = torch.randn(301, 333), torch.randn(301, 9), torch.randn(7, 9, 333)
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append([kernels.down(x, table, groups), kernels.up(z, table, groups), kernels.outer(z, x, groups)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*found, strict=True))


def test_without_a_compiler_the_package_says_so_and_works() -> None:
    code = (
        "import sys; sys.modules['torchrec_mdr.ops._rows'] = None\n"
        "import torch\n"
        "from torchrec_mdr.ops import cpu_kernels as rows, products as kernels\n"
        "from torchrec_mdr.ops.groups import DomainGroups\n"
        "assert not rows.is_supported(torch.empty(1))\n"
        "groups = DomainGroups.from_ids(torch.tensor([0, 0]), 1)\n"
        "print(kernels.down(torch.eye(2), torch.ones(1, 1, 2), groups).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[[1.0], [1.0]]", done.stderr
    assert ("install a C++ compiler" in done.stderr) == (not torch.cuda.is_available())


def test_equals_the_row_loop_where_groups_are_combinations(engine: str) -> None:
    torch.manual_seed(0)
    sizes = (3, 4, 2)
    ids = torch.stack([torch.randint(size, (30,)) for size in sizes], 1)
    ids = ids[(ids @ torch.tensor([8, 2, 1])).argsort()]
    for division, groups in enumerate(BatchDomains.from_sorted(ids, sizes).groups):
        assert torch.equal(groups.ids, ids[:, division]) and groups.permutation is None
        assert (groups.adapter_ids is not None) == (division > 0)
        x, base = torch.randn(30, 13, requires_grad=True), torch.randn(30, 6, requires_grad=True)
        compare(x, weights(sizes[division], 13, 6, 3), groups, base, 1e-4)


def test_tables_may_lie_in_memory_as_they_like(engine: str) -> None:
    torch.manual_seed(0)
    groups = DomainGroups.from_ids(torch.randint(N, (17,)), N)
    lora_A, lora_B, bias = weights(N, 13, 6, 3)
    assert lora_B.mT.is_contiguous()
    turned = lora_A.detach().mT.contiguous().mT, lora_B.detach().contiguous(), bias.detach().T.contiguous().T
    for changed in range(3):
        parts = [lora_A, lora_B, bias]
        parts[changed] = turned[changed].requires_grad_()
        assert parts[changed].stride() != (lora_A, lora_B, bias)[changed].stride()
        x, base = torch.randn(17, 13, requires_grad=True), torch.randn(17, 6, requires_grad=True)
        compare(x, parts, groups, base, 1e-4)


@pytest.mark.parametrize("rows_sorted", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype, rows_sorted: bool) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([0, 0, 1, 3, 3, 3, 4])
    make = DomainGroups.from_sorted_ids if rows_sorted else DomainGroups.from_ids
    x = torch.randn(len(ids), 113).to(dtype).requires_grad_()
    base = torch.randn(len(ids), 5).to(dtype).requires_grad_()
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.03, torch.float64: 1e-12}[dtype]
    compare(x, weights(N, 113, 5, 3, dtype), make(ids, N), base, tolerance)


def test_weights_take_the_type_of_the_rows() -> None:
    groups = DomainGroups.from_ids(torch.tensor([1, 0]), 2)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    parts = weights(2, 4, 3, 2)
    y = grouped_low_rank(x, *parts, groups)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {part.grad.dtype for part in parts} == {torch.float32}


@each_kind_of_engine
@pytest.mark.parametrize("combinations", [True, False])
def test_gradcheck(combinations: bool, engine: str) -> None:
    torch.manual_seed(0)
    groups = DomainGroups.from_ids(torch.tensor([2, 0, 2, 1]), 3)
    if combinations:
        ids = torch.tensor([2, 0, 0, 2])
        groups = DomainGroups(ids, torch.tensor([1, 3, 4], dtype=torch.int32), 3, torch.tensor([2, 0, 2]))
    x, base = torch.randn(4, 5), torch.randn(4, 3)
    inputs = [leaf.detach().double().requires_grad_() for leaf in (x, *weights(3, 5, 3, 2), base)]
    assert torch.autograd.gradcheck(lambda *a: grouped_low_rank(*a[:4], groups, a[4]), inputs)


@crossed(
    ("engine",),
    engine=["rows-64", "groups", "tiles"],
    make=[DomainGroups.from_ids, DomainGroups.from_sorted_ids],
    dtype=[torch.float32, torch.float64],
)
def test_no_rows(dtype: torch.dtype, make: type, engine: str) -> None:
    groups = make(torch.empty(0, dtype=torch.int64), N)
    x = torch.empty(0, 7, dtype=dtype, requires_grad=True)
    parts = weights(N, 7, 3, 2, dtype)
    y = grouped_low_rank(x, *parts, groups, torch.empty(0, 3, dtype=dtype))
    assert y.shape == (0, 3)
    y.sum().backward()
    assert x.grad.shape == (0, 7)
    assert all(part.grad.shape == part.shape and not part.grad.any() for part in parts)


def test_gradients_that_are_expanded_or_wanted_in_part(engine: str) -> None:
    groups = DomainGroups.from_ids(torch.tensor([1, 0, 1]), 2)
    for wanted in range(4):
        torch.manual_seed(0)
        leaves = [torch.randn(3, 8), *(part.detach() for part in weights(2, 8, 4, 4))]
        leaves[wanted].requires_grad_()
        y = grouped_low_rank(*leaves, groups)
        y.sum().backward()  # a gradient of stride 0
        slow = [leaf.detach().clone() for leaf in leaves]
        slow[wanted].requires_grad_()
        low_rank_rows(*slow, groups.ids).sum().backward()
        torch.testing.assert_close(leaves[wanted].grad, slow[wanted].grad)


def test_permuting_rows_permutes_outputs() -> None:
    torch.manual_seed(0)
    ids, x, parts = torch.randint(N, (40,)), torch.randn(40, 9), weights(N, 9, 6, 2)
    order = torch.randperm(40)
    y = grouped_low_rank(x, *parts, DomainGroups.from_ids(ids, N))
    permuted = grouped_low_rank(x[order], *parts, DomainGroups.from_ids(ids[order], N))
    torch.testing.assert_close(permuted, y[order])


def test_a_mixed_batch_equals_its_single_domain_parts() -> None:
    torch.manual_seed(0)
    ids, x, parts = torch.randint(N, (40,)), torch.randn(40, 9), weights(N, 9, 6, 2)
    y = grouped_low_rank(x, *parts, DomainGroups.from_ids(ids, N))
    for domain in range(N):
        rows = ids == domain
        alone = grouped_low_rank(x[rows], *parts, DomainGroups.from_ids(ids[rows], N))
        torch.testing.assert_close(alone, y[rows])


def test_a_zero_update_is_the_base_bitwise(engine: str) -> None:
    torch.manual_seed(0)
    lora_A, lora_B, bias = (part.detach() for part in weights(N, 113, 5, 2))
    base = torch.randn(40, 5)
    groups = DomainGroups.from_ids(torch.randint(N, (40,)), N)
    y = grouped_low_rank(torch.randn(40, 113), lora_A, torch.zeros_like(lora_B), torch.zeros_like(bias), groups, base)
    assert torch.equal(y, base)


@crossed(("engine",), engine=ENGINES, domains=[2, 20, 300], bias=[True, False])
def test_a_layer_in_the_same_go_is_the_layer_and_the_product(bias: bool, domains: int, engine: str) -> None:
    torch.manual_seed(0)
    groups = DomainGroups.from_ids(torch.randint(domains, (200,)), domains)
    leaves = [torch.randn(200, 13), torch.randn(6, 13), torch.randn(6)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, *weights(domains, 13, 6, 3))]
    x, weight, own, *parts = leaves
    y = grouped_low_rank(x, *parts, groups, LinearWeights(weight, own if bias else None))
    slow = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.nn.functional.linear(slow[0], slow[1], slow[2] if bias else None)
    expected = expected + low_rank_rows(slow[0], *slow[3:], groups.ids)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, gradient, allow_unused=not bias)
    wanted = torch.autograd.grad(expected, slow, gradient.double(), allow_unused=not bias)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@crossed(("engine",), engine=ENGINES, domains=[2, 300], bias=[True, False])
def test_a_zero_update_is_the_layer_bitwise(bias: bool, domains: int, engine: str) -> None:
    torch.manual_seed(0)
    groups = DomainGroups.from_ids(torch.randint(domains, (400,)), domains)
    layer = torch.nn.Linear(113, 30, bias=bias)
    x, lora_A = torch.randn(400, 113), torch.randn(domains, 2, 113)
    zeros = torch.zeros(domains, 30, 2), torch.zeros(domains, 30)
    y = grouped_low_rank(x, lora_A, *zeros, groups, LinearWeights(layer.weight, layer.bias))
    assert torch.equal(y, layer(x))


@each_kind_of_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_operators_does_not_depend_on_the_number_of_domains(dtype: torch.dtype, engine: str) -> None:
    def count(domains: int) -> int:
        torch.manual_seed(0)
        parts = weights(domains, 9, 6, 3, dtype)
        x = torch.randn(300, 9, dtype=dtype, requires_grad=True)
        with CountOps() as ops:
            groups = DomainGroups.from_ids(torch.arange(300) % domains, domains)
            grouped_low_rank(x, *parts, groups, x[:, :6]).sum().backward()
        return ops.count

    assert 10 < count(2) == count(300)


@pytest.mark.skipif(not rows.is_supported(torch.empty(1)), reason="the compiled kernels are missing")
def test_compiled_code_takes_operands_that_fit_only() -> None:
    groups = DomainGroups.from_sorted_ids(torch.tensor([0, 0, 1]), 2)
    table = torch.zeros(2, 2, 5)
    with pytest.raises(ValueError, match="4 rows, but the domains of 3"):
        rows.down(torch.zeros(4, 5), table, groups)
    with pytest.raises(ValueError, match="2 rows, but the domains of 3"):
        rows.up(torch.zeros(3, 2), table, groups, torch.zeros(5), out=torch.zeros(2, 5))
    with pytest.raises(TypeError, match="not of one type"):
        rows.down(torch.zeros(3, 5, dtype=torch.float64), table, groups)
