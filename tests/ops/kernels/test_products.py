"""Down, up, outer and the layer, forward and backward, against rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cases import crossed
from tests.ops.kernels.rows import DTYPES, KINDS, N, check, own, rows_in, sums
from torchrec_mdr.ops import products
from torchrec_mdr.ops.low_rank import LinearWeights, grouped_low_rank
from torchrec_mdr.ops.triton import is_supported, sizes

SIZES = [
    (50, 40, 33, 5),
    (130, 9, 8, 2),
    (1, 16, 8, 1),
    (33, 7, 130, 70),
    (0, 5, 6, 2),
    (40, 70, 16, 33),
]  # rows, in, out, rank


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape).to(dtype)


@crossed(dtype=DTYPES, kind=KINDS, size=SIZES, apart=[False, True])
def test_down_up_and_outer(dtype: torch.dtype, kind: str, size: tuple[int, ...], apart: bool) -> None:
    """Apart: rows of z lie in a larger buffer, x and the table are transposes."""
    count, width, _, rank = size
    groups = rows_in(kind, count)
    x, table = normal(count, width, dtype=dtype), normal(N, rank, width, dtype=dtype)
    buffer = normal(count, rank + 1, dtype=dtype)
    last = normal(N, width, dtype=dtype)
    if apart:
        x, table = x.mT.contiguous().mT, table.mT.contiguous().mT
    out = buffer[:, :-1] if apart else None
    z = products.down(x, table, groups, out=out)
    assert (z is out) == apart
    check(z, torch.einsum("brw,bw->br", own(table, groups), x.double()))
    weighed = torch.einsum("brw,br->bw", own(table, groups), z.double())
    check(products.up(z, table, groups), weighed)
    start = normal(count, width, dtype=dtype)
    wanted = start + weighed
    check(products.up(z, table, groups, start, out=start if apart else None), wanted)
    added = buffer[:, -1:].double() * own(last, groups)
    both = torch.cat([z, buffer[:, -1:]], 1)
    check(products.up(both, table, groups, last[0], last=last), last[0] + weighed + added)
    check(products.outer(both, x, groups), sums(both.double()[:, :, None] * x.double()[:, None], groups))


@crossed(dtype=DTYPES, kind=KINDS, size=SIZES, base=["none", "output", "layer", "one pass"], bias=[True, False])
def test_the_layer(
    dtype: torch.dtype, kind: str, size: tuple[int, ...], base: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, width, out, rank = size
    one_pass = base == "one pass" and rank <= sizes.MOST_VECTORS
    monkeypatch.setattr(sizes, "takes_layer", lambda *given: one_pass)
    groups = rows_in(kind, count)
    x, lora_A = normal(count, width, dtype=dtype), normal(N, rank, width, dtype=dtype)
    lora_B = normal(N, rank, out, dtype=dtype).mT
    own_bias, output = normal(N, out, dtype=dtype) if bias else None, normal(count, out, dtype=dtype)
    weight, linear_bias = normal(out, width, dtype=dtype), normal(out, dtype=dtype)
    given = {"none": (None, None, None), "output": (output, None, None)}.get(base, (None, weight, linear_bias))
    y, z = products.low_rank(x, lora_A, lora_B, own_bias, *given, groups, exact=False)
    inner = torch.einsum("brw,bw->br", own(lora_A, groups), x.double())
    check(z[:, :rank], inner)
    assert z.shape[1] == rank + bias and bool((z[:, rank:] == 1).all())
    wanted = torch.einsum("bor,br->bo", own(lora_B, groups), z[:, :rank].double())
    wanted = wanted + (own(own_bias, groups) if own_bias is not None else 0.0)
    layer = F.linear(x.double(), weight.double(), linear_bias.double())
    check(y, {"none": torch.zeros(out), "output": output}.get(base, layer) + wanted)
    if base in ("layer", "one pass"):
        exact, _ = products.low_rank(x, lora_A, lora_B, own_bias, *given, groups)
        missing = groups.ids < 0
        assert torch.equal(exact[missing], F.linear(x, weight, linear_bias)[missing])


@crossed(dtype=DTYPES, kind=KINDS, base=["output", "layer", "one pass"])
def test_gradients(dtype: torch.dtype, kind: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "takes_layer", lambda *given: base == "one pass")
    count, width, out, rank = 40, 20, 24, 4
    groups = rows_in(kind, count)
    inputs = [
        *(normal(count, width, dtype=dtype), normal(N, rank, width, dtype=dtype), normal(N, rank, out, dtype=dtype).mT),
        normal(N, out, dtype=dtype),
        normal(count, out, dtype=dtype) if base == "output" else normal(out, width, dtype=dtype),
    ]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    x, lora_A, lora_B, bias, given = inputs
    y = grouped_low_rank(x, lora_A, lora_B, bias, groups, given if base == "output" else LinearWeights(given, None))
    grad = normal(count, out, dtype=dtype)
    ours = torch.autograd.grad(y, inputs, grad)
    slow = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, lora_A, lora_B, bias, given = slow
    inner = torch.einsum("brw,bw->br", own(lora_A, groups), x)
    wanted = (given if base == "output" else x @ given.mT) + torch.einsum("bor,br->bo", own(lora_B, groups), inner)
    wanted = wanted + own(bias, groups)
    for one, right in zip(ours, torch.autograd.grad(wanted, slow, grad.double()), strict=True):
        check(one, right, {torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("kind", ["missing", "missing combinations"])
def test_nothing_of_an_adapter_comes_into_rows_without_one(
    kind: str, one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even zero times infinity."""
    monkeypatch.setattr(sizes, "takes_layer", lambda *given: one_pass)
    groups = rows_in(kind, 40)
    missing = groups.ids < 0
    bad = torch.full((N, 3, 20), float("inf"))
    x, weight = normal(40, 20, dtype=torch.float32), normal(20, 20, dtype=torch.float32)
    y, z = products.low_rank(x, bad, bad.mT, bad[:, 0], None, weight, None, groups, exact=False)
    check(y[missing], (x.double() @ weight.double().mT)[missing])
    assert bool((z[missing, :3] == 0).all()) and not y[~missing].isfinite().any()
    assert bool((products.down(x, bad, groups)[missing] == 0).all())
    assert torch.equal(products.up(z, bad, groups, x, last=bad[:, 0])[missing], x[missing])


def test_what_is_served() -> None:
    assert all(is_supported(torch.empty(1, dtype=dtype)) for dtype in DTYPES)
    assert not is_supported(torch.empty(1, dtype=torch.float64)) and not is_supported(torch.empty(1, device="meta"))
    assert not is_supported(torch.fx.Proxy(torch.fx.Graph().placeholder("x")))


def test_float64_goes_on_by_plain_operators() -> None:
    groups = rows_in("missing", 40)
    x, table = normal(40, 6, dtype=torch.float64), normal(N, 2, 6, dtype=torch.float64)
    check(products.down(x, table, groups), torch.einsum("brw,bw->br", own(table, groups), x), 1e-14)
