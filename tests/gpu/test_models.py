"""Whole models on a GPU: training steps, compiled and not, and the banks' optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gpu.test_layers import no_waiting, rows_of
from tests.ops.kernels.rows import check
from tests.test_compiled import EACH_ONCE, adapters, inputs, make
from torchrec_mdr.adapters.bank import Bank, LoRABank
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.optim.bank_adam import BankAdam

each_method = pytest.mark.parametrize(("method", "backbone"), EACH_ONCE)


def on_gpu(model: MultiDomainModel, num_rows: int) -> tuple[Any, ...]:
    """A batch whose numbers of values per key the host knows, as the loader's."""
    dense, features, ids = inputs(model, num_rows)
    return dense.cuda(), features.sync().to(torch.device("cuda")), ids.cuda()


def step(model: nn.Module, batch: tuple[Any, ...], optimizer: BankAdam) -> None:
    optimizer.zero_grad()
    logits = model(*batch).flatten()
    F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
    optimizer.step()


def adapt(model: nn.Module, fused: bool) -> BankAdam:
    """Lets the banks alone train."""
    banks = [module for module in model.modules() if isinstance(module, Bank)]
    own = {parameter for bank in banks for parameter in bank.parameters(recurse=False)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in own)
    return BankAdam(banks, lr=0.01, fused=fused)


@each_method
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_waits_for_nothing_and_is_the_step_on_cpu(method: str, backbone: str, fused: bool) -> None:
    plain = make(method, backbone)
    model = copy.deepcopy(plain).cuda()
    optimizer, reference = adapt(model, fused), adapt(plain, fused)
    batch, again = on_gpu(model, 40), inputs(plain, 40)
    for _ in range(2):
        step(model, batch, optimizer)
        step(plain, again, reference)
    with no_waiting():
        step(model, batch, optimizer)
    step(plain, again, reference)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        close = torch.isclose(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)
        assert close.float().mean() >= 0.999, name  # Adam moves all alike whose gradient is but rounding


@each_method
def test_steps_have_the_same_bits_twice(method: str, backbone: str) -> None:
    runs = []
    for _ in range(2):
        model = make(method, backbone).cuda()
        optimizer, batch = adapt(model, False), on_gpu(model, 200)
        for _ in range(3):
            step(model, batch, optimizer)
        runs.append([value.clone() for value in model.state_dict().values()])
    assert all(map(torch.equal, *runs))


@each_method
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_models_are_the_models(method: str, backbone: str, training: bool) -> None:
    eager = make(method, backbone).train(training).cuda()
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for num_rows in (7, 120):
        batch = on_gpu(model, num_rows)
        y, wanted = compiled(*batch), eager(*batch)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        gradients = [
            torch.autograd.grad(z.sin().sum(), adapters(m), allow_unused=True) for z, m in ((y, model), (wanted, eager))
        ]
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_adam_moves_rows_as_on_cpu(fused: bool) -> None:
    """Groups of one tile, of several and of none; rows that are frozen; weight decay."""
    ours = LoRABank(30, 70, 50, 6)
    nn.init.normal_(ours.lora_B)
    theirs = copy.deepcopy(ours).double()
    ours.cuda()
    optimizers = [BankAdam([bank], lr=0.01, weight_decay=0.1, fused=fused and bank is ours) for bank in (ours, theirs)]
    for bank, optimizer in zip((ours, theirs), optimizers, strict=True):
        optimizer.freeze(bank, torch.arange(30, device=bank.bias.device) == 5)
    for _ in range(3):
        ids = torch.cat([torch.zeros(600, dtype=torch.int64), torch.randint(25, (200,))]).cuda()
        x, grad = torch.randn(800, 70, device="cuda"), torch.randn(800, 50, device="cuda")
        for bank, optimizer in zip((ours, theirs), optimizers, strict=True):
            own = bank.bias
            groups = DomainGroups.from_ids(ids.to(own.device), 30)
            optimizer.zero_grad()
            bank(x.to(own), groups).backward(grad.to(own))
            assert (own.grad is None) == (fused and bank is ours)
            optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        check(one.detach().cpu(), other.detach(), 1e-3)
        assert torch.equal(
            optimizers[0].state[one]["step"].cpu().double(), optimizers[1].state[other]["step"].double()
        ), name


def test_bank_adam_waits_for_nothing() -> None:
    bank = LoRABank(30, 70, 50, 6).cuda()
    optimizer, groups = BankAdam([bank], lr=0.01, fused=True), rows_of(800, 30, False)
    x: Tensor = torch.randn(800, 70, device="cuda")
    for _ in range(2):
        bank(x, groups).square().sum().backward()
        optimizer.step()
    bank(x, groups).square().sum().backward()
    with no_waiting():
        optimizer.step()
