"""Products, layers and norms on a GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.kernels.rows import check, own, sums
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.ops import products
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import LinearWeights, grouped_low_rank
from torchrec_mdr.ops.norms import normalise_by_domain
from torchrec_mdr.ops.statistics import affine_by_domain, centered_sums

IN, OUT, R = 128, 96, 5
# the type, how float32 is multiplied, and what a result may be off by, of its largest number
PRECISIONS = {
    "float32": (torch.float32, "ieee", 2e-6),
    "tf32": (torch.float32, "tf32", 3e-3),
    "bfloat16": (torch.bfloat16, "ieee", 2e-2),
    "float16": (torch.float16, "ieee", 3e-3),
}


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> tuple[torch.dtype, float]:
    """The type and the tolerance, with PyTorch set so."""
    dtype, products_of_float32, tolerance = PRECISIONS[request.param]
    torch.backends.cuda.matmul.fp32_precision = products_of_float32
    return dtype, tolerance


def rows_of(count: int, num_domains: int, in_order: bool, unknown: bool = False) -> DomainGroups:
    ids = torch.randint(num_domains, (count,), device="cuda")
    if in_order:
        return DomainGroups.from_sorted_ids(ids.sort().values, num_domains)
    missing = torch.rand(count, device="cuda") < (0.1 if unknown else 0.0)
    return DomainGroups.from_ids(torch.where(missing, -1, ids), num_domains)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def layer_of(num_domains: int, dtype: torch.dtype, sizes: tuple[int, int, int] = (IN, OUT, R)) -> tuple[Tensor, ...]:
    """lora_A, lora_B, bias, and the weight and the bias of the layer beside, as a training step has them."""
    width, out, rank = sizes
    lora_A, lora_B = normal(num_domains, rank, width, dtype=dtype), normal(num_domains, rank, out, dtype=dtype).mT
    bias, weight = normal(num_domains, out, dtype=dtype), normal(out, width, dtype=dtype)
    tables = (tensor.requires_grad_() for tensor in (lora_A, lora_B, bias))
    return *tables, weight, normal(out, dtype=dtype)


def output_and_gradients(x: Tensor, layer: tuple[Tensor, ...], groups: DomainGroups, grad: Tensor) -> list[Tensor]:
    *tables, weight, linear_bias = layer
    y = grouped_low_rank(x, *tables, groups, LinearWeights(weight, linear_bias))
    return [y.detach(), *torch.autograd.grad(y, [x, *tables], grad)]


def in_float64(x: Tensor, layer: tuple[Tensor, ...], groups: DomainGroups, grad: Tensor) -> list[Tensor]:
    """The same by hand, row by row."""
    lora_A, lora_B, _, weight, _ = (tensor.detach() for tensor in layer)
    own_A, own_B, grad, x = own(lora_A, groups), own(lora_B, groups), grad.double(), x.detach().double()
    z, grad_z = torch.einsum("brw,bw->br", own_A, x), torch.einsum("bor,bo->br", own_B, grad)
    y = F.linear(x, weight.double(), layer[4].double()) + own(layer[2].detach(), groups)
    y = y + torch.einsum("bor,br->bo", own_B, z)
    grad_x = grad @ weight.double() + torch.einsum("brw,br->bw", own_A, grad_z)
    grad_A = sums(grad_z[:, :, None] * x[:, None], groups)
    return [y, grad_x, grad_A, sums(grad[:, :, None] * z[:, None], groups), sums(grad, groups)]


def compare(x: Tensor, layer: tuple[Tensor, ...], groups: DomainGroups, grad: Tensor, tolerance: float) -> None:
    ours, wanted = output_and_gradients(x, layer, groups, grad), in_float64(x, layer, groups, grad)
    for one, right in zip(ours, wanted, strict=True):
        check(one, right, tolerance)


@pytest.mark.parametrize("num_domains", [1, 3, 20, 1000, 1024, 10_000])
def test_products(num_domains: int, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    for in_order in (True, False):
        groups = rows_of(2000, num_domains, in_order, unknown=True)
        x, z = normal(2000, IN, dtype=dtype), normal(2000, R, dtype=dtype)
        table = normal(num_domains, R, IN, dtype=dtype)
        check(products.down(x, table, groups), torch.einsum("brw,bw->br", own(table, groups), x.double()), tolerance)
        check(products.up(z, table, groups), torch.einsum("brw,br->bw", own(table, groups), z.double()), tolerance)
        check(products.outer(z, x, groups), sums(z.double()[:, :, None] * x.double()[:, None], groups), tolerance)


@pytest.mark.parametrize("num_domains", [1, 3, 1000])
def test_layers(num_domains: int, precision: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = precision
    for in_order in (True, False):
        groups = rows_of(2000, num_domains, in_order, unknown=True)
        x, grad = normal(2000, IN, dtype=dtype).requires_grad_(), normal(2000, OUT, dtype=dtype)
        layer = layer_of(num_domains, dtype)
        compare(x, layer, groups, grad, 3 * tolerance)


def test_a_layer_in_one_pass(precision: tuple[torch.dtype, float]) -> None:
    """Large groups, all known: the layer's own product and the adapters' in one kernel, where tensor cores multiply."""
    dtype, tolerance = precision
    sizes = 256, 320, 16
    groups, layer = rows_of(20_000, 3, True), layer_of(3, dtype, sizes)
    x, grad = normal(20_000, 256, dtype=dtype).requires_grad_(), normal(20_000, 320, dtype=dtype)
    compare(x, layer, groups, grad, 3 * tolerance)


def test_rows_without_an_adapter_have_the_layers_bits(precision: tuple[torch.dtype, float]) -> None:
    dtype, _ = precision
    groups, layer, x = rows_of(20_000, 3, False, unknown=True), layer_of(3, dtype), normal(20_000, IN, dtype=dtype)
    *tables, weight, linear_bias = layer
    y = grouped_low_rank(x, *tables, groups, LinearWeights(weight, linear_bias))
    plain, missing = F.linear(x, weight, linear_bias), groups.ids < 0
    assert torch.equal(y[missing], plain[missing]) and not torch.equal(y[~missing], plain[~missing])


def test_ids_outside_their_range_are_no_domain() -> None:
    ids = torch.tensor([-5, 0, 3, 2**40, 2, -1], device="cuda")
    groups = DomainGroups.from_ids(ids, 3)
    assert groups.ids.tolist() == [-1, 0, -1, -1, 2, -1]
    bank = LoRABank(3, 8, 4, 2).cuda()
    torch.nn.init.ones_(bank.bias)
    y = bank(torch.randn(6, 8, device="cuda"), groups)
    assert (y != 0).any(1).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("num_domains", [3, 300])
def test_the_same_bits_twice(num_domains: int, precision: tuple[torch.dtype, float]) -> None:
    dtype, _ = precision
    for count in (3000, 20_000):
        groups = rows_of(count, num_domains, count > 3000)
        x, layer = normal(count, IN, dtype=dtype).requires_grad_(), layer_of(num_domains, dtype)
        grad, centre = normal(count, OUT, dtype=dtype), normal(num_domains, OUT, dtype=dtype)
        once, again = (output_and_gradients(x, layer, groups, grad) for _ in range(2))
        assert all(map(torch.equal, once, again))
        assert torch.equal(*(centered_sums(grad, grad, centre, groups) for _ in range(2)))


@pytest.mark.parametrize("num_domains", [1, 3, 1000])
def test_norms(num_domains: int) -> None:
    groups = rows_of(3000, num_domains, False, unknown=True)
    u, v, gate = (torch.randn(3000, 70, device="cuda") for _ in range(3))
    centre, table = torch.randn(num_domains, 70, device="cuda"), torch.randn(num_domains, 4, 70, device="cuda")
    a, b, c, e = own(table, groups).unbind(1)
    counted, moved = torch.where(gate > 0, u.double(), 0.0), v.double() - own(centre, groups)
    check(affine_by_domain(u, v, table, groups, gate), a * counted + b * (v.double() - c) + e, 1e-6)
    wanted = torch.stack([sums(counted, groups), sums(counted * moved, groups)], 1)
    check(centered_sums(u, v, centre, groups, gate), wanted, 1e-6)


@pytest.mark.parametrize("num_domains", [1, 3, 1000])
def test_normalised_rows_are_those_of_cpu(num_domains: int) -> None:
    groups = rows_of(3000, num_domains, False, unknown=True)
    x, grad, weight, bias = (torch.randn(rows, 70) for rows in (3000, 3000, num_domains, num_domains))
    outputs = []
    for device in ("cuda", "cpu"):
        inputs = [tensor.to(device).requires_grad_() for tensor in (x + 3, weight, bias)]
        statistics = torch.zeros(num_domains, 70, device=device), torch.ones(num_domains, 70, device=device)
        own_groups = groups.to(torch.device(device))
        y = normalise_by_domain(inputs[0], own_groups, *inputs[1:], *statistics, 1e-5, 0.1, True, True)
        outputs.append([y.detach(), *statistics, *torch.autograd.grad(y, inputs, grad.to(device))])
    for ours, theirs in zip(*outputs, strict=True):
        check(ours.cpu(), theirs.double(), 1e-4)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Where waiting for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layer_waits_for_nothing(precision: tuple[torch.dtype, float]) -> None:
    dtype, _ = precision
    x, layer, grad = normal(3000, IN, dtype=dtype).requires_grad_(), layer_of(20, dtype), normal(3000, OUT, dtype=dtype)
    ids = torch.randint(20, (3000,), device="cuda")
    output_and_gradients(x, layer, DomainGroups.from_ids(ids, 20), grad)  # compiles
    with no_waiting():
        output_and_gradients(x, layer, DomainGroups.from_ids(ids, 20), grad)


def test_autocast_gives_what_it_gives_a_plain_layer() -> None:
    groups, layer = rows_of(500, 5, False, unknown=True), layer_of(5, torch.float32)
    x, grad = normal(500, IN, dtype=torch.float32).requires_grad_(), normal(500, OUT, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        ours = output_and_gradients(x, layer, groups, grad)
    assert ours[0].dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in ours[1:])
    for one, wanted in zip(ours, in_float64(x, layer, groups, grad), strict=True):
        check(one, wanted, 5e-2)


def test_a_replayed_graph_takes_the_rows_of_its_own_run() -> None:
    """Not the tiles that were mapped when it was captured, nor those that eager code mapped."""
    layer = layer_of(7, torch.float32)
    x, grad = normal(600, IN, dtype=torch.float32).requires_grad_(), normal(600, OUT, dtype=torch.float32)
    ids = torch.zeros(600, dtype=torch.int64, device="cuda")
    static = DomainGroups.from_ids(ids, 7)
    for make in (lambda: DomainGroups.from_ids(ids, 7), lambda: static):
        run: Callable[[], list[Tensor]] = lambda make=make: output_and_gradients(x, layer, make(), grad)  # noqa: E731
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
        ids.copy_(torch.randint(-1, 7, (600,), device="cuda"))
        fresh = DomainGroups.from_ids(ids, 7)
        for name in ("ids", "offsets", "permutation", "inverse"):
            getattr(static, name).copy_(getattr(fresh, name))
        graph.replay()
        for ours, wanted in zip(captured, output_and_gradients(x, layer, fresh, grad), strict=True):
            torch.testing.assert_close(ours, wanted)
