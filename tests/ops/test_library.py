"""The operators torch.ops.torchrec_mdr.*, by PyTorch's own checks and against eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import low_rank_rows
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.ops import attention
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.library import OPS, SCHEMAS, flat
from torchrec_mdr.ops.low_rank import LinearWeights, grouped_low_rank

IDS = torch.tensor([2, -1, 0, 3, 3, 0, -1])
N, B, IN, OUT, R = 4, len(IDS), 10, 6, 3


def groups(sort: bool = False) -> DomainGroups:
    """Rows in any order with two that have no adapter; or sorted ones, all with an adapter."""
    return DomainGroups.from_sorted_ids(IDS.clamp(min=0).sort().values, N) if sort else DomainGroups.from_ids(IDS, N)


def rows(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def arguments(name: str, sort: bool) -> tuple[Any, ...]:
    """Sample inputs of each operator."""
    own = flat(groups(sort))
    statistics = rows(N, OUT, grad=False), rows(N, OUT, grad=False).abs() + 0.5
    samples: dict[str, tuple[Any, ...]] = {
        "down": (rows(B, IN), rows(N, R, IN)),
        "up": (rows(B, R + 1), rows(N, R, OUT), rows(B, OUT), rows(N, OUT)),
        "outer": (rows(B, R, grad=False), rows(B, IN, grad=False)),
        "low_rank": (rows(B, IN), rows(N, R, IN), rows(N, OUT, R), rows(N, OUT), None, rows(OUT, IN), rows(OUT)),
        "normalise": (rows(B, OUT), rows(N, OUT), rows(N, OUT), *statistics, 1e-5, 0.1, sort, True),
        "normalise_backward": (
            *(rows(B, OUT, grad=False), rows(B, OUT, grad=False)),
            *(rows(N, OUT, grad=False) for _ in range(4)),
            *(rows(0, grad=False), None),
        ),
        "attention": attention_arguments(),
        "attention_backward": (rows(B, 2, R + 1, grad=False), *attention_arguments(backward=True)),
        "matmul": (rows(B, IN), rows(N, OUT, IN)),
        "matmul_outer": (rows(B, OUT, grad=False), rows(B, IN, grad=False)),
    }
    if name in attention.SCHEMAS:
        return samples[name]
    return *samples[name], *((groups(sort=True).offsets,) if name.startswith("matmul") else own)


def attention_arguments(backward: bool = False) -> tuple[Any, ...]:
    """Two banks: one with rows that have no adapter, and one of sorted rows."""
    queries, inner = rows(B, OUT, grad=not backward), rows(B, 2, R + 1, grad=not backward)
    tables = [rows(N, OUT, R + 1, grad=not backward), rows(N, OUT, R + 1, grad=not backward) * 2]
    kept = (rows(B, 2, R + 1, grad=False), rows(B, 2, grad=False).softmax(1)) if backward else ()
    return queries, inner, *kept, tables, *attention._flat([groups(), groups(sort=True)])


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("name", [*SCHEMAS, *attention.SCHEMAS])
def test_opcheck(name: str, sort: bool) -> None:
    torch.library.opcheck(getattr(OPS, name).default, arguments(name, sort))


@pytest.mark.parametrize("base", ["none", "output", "layer"])
def test_low_rank_is_the_sum_that_a_loop_over_rows_gives(base: str) -> None:
    """By value and by gradient, through the dispatcher and without; rows without an adapter are the base's, bitwise."""
    x, weight, linear_bias, output = rows(B, IN), rows(OUT, IN), rows(OUT), rows(B, OUT)
    bank = LoRABank(N, IN, OUT, R)
    with torch.no_grad():
        bank.lora_B.copy_(rows(N, OUT, R))
        bank.bias.copy_(rows(N, OUT))
    tables = bank.lora_A, bank.lora_B, bank.bias
    given = {"none": None, "output": output, "layer": LinearWeights(weight, linear_bias)}[base]
    start = {"none": torch.zeros(B, OUT), "output": output, "layer": torch.nn.functional.linear(x, weight, linear_bias)}
    known = IDS >= 0
    part = low_rank_rows(x, *tables, IDS.clamp(min=0))
    wanted = start[base] + torch.where(known.unsqueeze(1), part, 0.0)
    eager = grouped_low_rank(x, *tables, groups(), given)
    layer = (weight, linear_bias) if base == "layer" else (None, None)
    operator, _ = OPS.low_rank(x, *tables, output if base == "output" else None, *layer, *flat(groups()))
    assert torch.equal(eager, operator)
    torch.testing.assert_close(eager, wanted)
    assert torch.equal(eager[~known], start[base][~known])
    inputs = [x, *tables, *{"none": [], "output": [output], "layer": [weight, linear_bias]}[base]]
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (eager, operator, wanted)]
    for one, other, right in zip(*gradients, strict=True):
        torch.testing.assert_close(one, right)
        torch.testing.assert_close(other, right)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [-2, N, 10**9])
def test_ids_out_of_range_are_refused_on_the_host(bad: int, dtype: torch.dtype) -> None:
    ids = torch.tensor([0, bad, 1], dtype=dtype)
    with pytest.raises(ValueError, match=rf"domain id {bad} in row 1 is outside the division's range \[0, {N}\)"):
        DomainGroups.from_ids(ids, N)


@pytest.mark.parametrize("bad", [-2, N, 10**9])
def test_in_compiled_code_they_are_no_domain(bad: int) -> None:
    bank = LoRABank(N, IN, OUT, R)
    torch.nn.init.normal_(bank.bias)

    def run(x: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = bank(x, DomainGroups.from_ids(ids, N))
        return y

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([0, bad, 1])
    y = compiled(rows(3, IN), ids)
    assert not y[1].any() and y[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_a_plain_layer(dtype: torch.dtype) -> None:
    bank, linear = LoRABank(N, IN, OUT, R), torch.nn.Linear(IN, OUT)
    x = rows(B, IN)
    with torch.autocast("cpu", dtype):
        plain, adapted = linear(x), bank(x, groups(), LinearWeights(linear.weight, linear.bias))
    assert adapted.dtype == plain.dtype == dtype
    torch.testing.assert_close(adapted, plain, rtol=2e-2, atol=2e-2)
    adapted.float().sum().backward()
    assert bank.bias.grad is not None and bank.bias.grad.dtype == torch.float32
