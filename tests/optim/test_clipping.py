"""Clipping by domain, against clip_grad_norm_ on each domain's own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.norm import CombinationNormBank
from torchrec_mdr.optim.clipping import DomainClipping

SIZES = [3, 2]


def test_each_domain_is_clipped_as_if_alone() -> None:
    torch.manual_seed(0)
    banks = [LoRABank(6, 4, 3, 2), LoRABank(3, 4, 3, 1), LoRABank(2, 4, 3, 2, division=1)]
    combinations = CombinationNormBank(SIZES, 4, 1e-5, 0.1)
    shared = nn.Linear(4, 3)
    for module in (*banks, combinations, shared):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * (torch.rand(parameter.shape[0]) < 0.7).view(
                -1, *[1] * (parameter.dim() - 1)
            )
    rows: dict[tuple[int, int], list[torch.Tensor]] = {}
    for bank in (*banks, combinations):
        for parameter in bank.parameters():
            for row in range(bank.num_adapters):
                of_domain = row // 2 if bank is combinations else row % SIZES[bank.division]
                rows.setdefault((bank.division, of_domain), []).append(parameter.grad[row])
    expected = []
    for grads in [*rows.values(), [p.grad for p in shared.parameters()]]:
        alone = [nn.Parameter(grad.clone()) for grad in grads]
        for parameter, grad in zip(alone, grads, strict=True):
            parameter.grad = grad.clone()
        norm = nn.utils.clip_grad_norm_(alone, 3.0)
        expected += [(grad, parameter.grad, bool(norm > 3.0)) for grad, parameter in zip(grads, alone, strict=True)]
    DomainClipping([*banks, combinations], shared.parameters(), SIZES, max_norm=3.0).clip()
    assert {clipped for _, _, clipped in expected} == {True, False}
    for grad, wanted, _ in expected:
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_small_enough_stays_bitwise() -> None:
    bank = LoRABank(3, 4, 3, 2)
    for parameter in bank.parameters():
        parameter.grad = torch.rand_like(parameter)
    before = [parameter.grad.clone() for parameter in bank.parameters()]
    DomainClipping([bank], [], [3], max_norm=1e3).clip()
    assert all(torch.equal(p.grad, old) for p, old in zip(bank.parameters(), before, strict=True))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_an_impossible_norm_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be positive"):
        DomainClipping([], [], [1], max_norm)
