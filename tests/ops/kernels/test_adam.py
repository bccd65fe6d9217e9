"""Adam's kernels against the same steps in float64, operator by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import crossed
from tests.ops.kernels.rows import KINDS, N, check, rows_in, sums
from torchrec_mdr.ops.triton import adam
from torchrec_mdr.optim.bank_adam import BankAdam

PRESENT, STEPS = [True, False, True, True, False], [0.0, 3.0, 700.0, 2.0, 0.0]
State = dict[str, Tensor]


def options(weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> dict[str, Any]:
    return {"lr": 0.01, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}


def like(param: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(param).copy_(values)


def state_of(param: Tensor) -> State:
    first, second = 0.1 * torch.randn(param.shape), 0.01 * torch.rand(param.shape)
    return {"step": torch.tensor(STEPS), "exp_avg": like(param, first), "exp_avg_sq": like(param, second)}


def plain(param: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> tuple[Tensor, State]:
    param, state = param.double(), {name: value.double() for name, value in state.items()}
    BankAdam._update_all(param, grad.double(), state, group, torch.tensor(PRESENT))
    return param, state


def check_step(before: Tensor, param: Tensor, state: State, wanted: tuple[Tensor, State]) -> None:
    """The step itself, not the values that it is small beside."""
    check(param.double() - before, wanted[0] - before.double(), 3e-5)
    absent = ~torch.tensor(PRESENT)
    assert torch.equal(param[absent], before[absent])
    for name, value in state.items():
        check(value, wanted[1][name])


@crossed(
    shape=[(N, 3, 37), (N, 37, 3), (N, 1030), (N, 1)],
    transposed=[False, True],
    dtype=[torch.float32, torch.bfloat16],
    weight_decay=[0.0, 0.1],
    betas=[(0.9, 0.999), (0.0, 0.99)],
)
def test_from_gradients(
    shape: tuple[int, ...], transposed: bool, dtype: torch.dtype, weight_decay: float, betas: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    param = torch.randn(shape)
    grad = torch.randn(shape[0], shape[1] + 1, *shape[2:]).to(dtype)[:, :-1]
    if transposed and param.dim() == 3:
        param, grad = param.mT, grad.mT
    state, group = state_of(param), options(weight_decay, betas)
    before, wanted = param.clone(), plain(param, grad, state, group)
    adam.update(param, grad, state, group, torch.tensor(PRESENT))
    check_step(before, param, state, wanted)


@crossed(kind=KINDS[:3], count=[0, 12, 130], rank=[3, 16, 70], bias=[True, False], weight_decay=[0.0, 0.1])
def test_from_factors(kind: str, count: int, rank: int, bias: bool, weight_decay: float) -> None:
    torch.manual_seed(0)
    width, groups, group = 20, rows_in(kind, count), options(weight_decay)
    z, x = torch.randn(count, rank + bias), torch.randn(count, width)
    table, own_bias = torch.randn(N, rank, width), torch.randn(N, width)
    table = table.mT if bias else table
    state, bias_state = state_of(table), state_of(own_bias)
    total = sums(z.double()[:, :, None] * x.double()[:, None], groups)
    before, wanted = table.clone(), plain(table, total[:, :-1].mT if bias else total, state, group)
    bias_before, bias_wanted = own_bias.clone(), plain(own_bias, total[:, -1], bias_state, group)
    biases = (own_bias, bias_state) if bias else (None, None)
    adam.update_from_factors(table, state, *biases, (z, x, groups), group, torch.tensor(PRESENT))
    check_step(before, table, state, wanted)
    if bias:
        check_step(bias_before, own_bias, bias_state, bias_wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_marks_rows_whose_gradient_is_not_zero(dtype: torch.dtype) -> None:
    grad = torch.zeros(5, 30, 50, dtype=dtype)
    grad[1, 29, 49], grad[4, 0, 0] = 1e-30, float("nan")
    present = torch.tensor([True, False, False, False, False])
    adam.mark_rows(grad.mT, present)
    assert present.tolist() == [True, True, False, False, True]
