"""Banks of whole layers: each row goes through its own domain's layer, and statistics are its own domain's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet, VectorCrossNet

from tests.helpers import randomise
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.backbones.fibinet import SENET, BilinearInteraction
from torchrec_mdr.backbones.linear import DenseWeights
from torchrec_mdr.baselines.layer_bank import (
    DomainLayer,
    LinearBank,
    ModuleBank,
    PartitionedNorm,
    domain_layer,
    layer_bank,
    replace_layers,
)
from torchrec_mdr.model import parameter_groups
from torchrec_mdr.ops.groups import BatchDomains, DomainGroups

N = 3
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (7,)),
    "linear on features": (lambda: nn.Linear(7, 5), (4, 7)),
    "vector cross net": (lambda: VectorCrossNet(7, 2), (7,)),
    "low rank cross net": (lambda: LowRankCrossNet(7, 2, low_rank=3), (7,)),
    "bilinear products": (lambda: BilinearInteraction(4, 6), (4, 6)),
    "dense weights": (lambda: DenseWeights(2), (2,)),
    "no dense weights": (lambda: DenseWeights(0), (0,)),
    "senet": (lambda: SENET(4, 2), (4, 6)),
}


def state_of(ids: Tensor, size: int = N) -> DomainState:
    return DomainState(Route.DOMAIN, BatchDomains.from_ids(ids, [size]))


def run(module: nn.Module, context: DomainContext, x: Tensor, ids: Tensor) -> Tensor:
    with context.open(state_of(ids)):
        y: Tensor = module(x)
    return y


@pytest.mark.parametrize("name", LAYERS)
def test_each_row_goes_through_its_own_domains_layer(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layers = [make() for _ in range(N)]
    for domain, layer in enumerate(layers):
        randomise(layer.state_dict(), seed=domain)
    context = DomainContext()
    holder = nn.ModuleList([copy.deepcopy(layers[0])])
    replace_layers(holder, lambda layer: domain_layer(layer, N, context))
    with torch.no_grad():
        for bank in (module for module in holder.modules() if isinstance(module, (LinearBank, ModuleBank))):
            for domain, layer in enumerate(layers):
                inner = dict(layer.named_modules())[bank_name(holder, bank)]
                for key, value in inner.named_parameters():
                    getattr(bank, key.replace(".", "_"))[domain] = value
    x, ids = torch.randn(33, *shape, requires_grad=True), torch.randint(N, (33,))
    y = run(holder[0], context, x, ids)
    expected = torch.cat([layers[d](row[None]) for row, d in zip(x, ids.tolist(), strict=True)])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    pull = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, pull, retain_graph=True) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if x.numel():
        y.backward(pull)
        expected.backward(pull)
        for bank in (module for module in holder.modules() if isinstance(module, (LinearBank, ModuleBank))):
            for domain, layer in enumerate(layers):
                inner = dict(layer.named_modules())[bank_name(holder, bank)]
                for key, value in inner.named_parameters():
                    own = getattr(bank, key.replace(".", "_")).grad[domain]
                    torch.testing.assert_close(own, value.grad, atol=1e-4, rtol=1e-4)


def bank_name(holder: nn.Module, bank: nn.Module) -> str:
    """The name, in the layer that was replaced, of what a bank stands for."""
    (name,) = (name for name, module in holder.named_modules() if module is bank)
    return name.removeprefix("0").removesuffix("bank").strip(".")


def test_copies_start_from_the_layer_and_train_with_the_backbone() -> None:
    layer = LowRankCrossNet(5, 2, low_rank=2)
    bank = layer_bank(layer, N)
    x = torch.randn(6, 5)
    groups = DomainGroups.from_ids(torch.tensor([2, 0, 1, 1, 0, 2]), N)
    torch.testing.assert_close(bank(x, groups), layer(x))
    randomise(layer.state_dict())
    bank.copy_layer(layer)
    torch.testing.assert_close(bank(x, groups), layer(x))
    model = nn.Sequential(DomainLayer(bank, DomainContext()))
    assert {group for group in parameter_groups(model).values()} == {ParameterGroup.BACKBONE}
    assert sum(p.numel() for p in bank.parameters()) == N * sum(p.numel() for p in layer.parameters())


def test_dropout_inside_a_layer_differs_by_row() -> None:
    layer = nn.Sequential(nn.Linear(4, 400), nn.Dropout(0.5))
    bank = ModuleBank(layer, 1)
    y = bank(torch.ones(40, 4), DomainGroups.from_ids(torch.zeros(40, dtype=torch.int64), 1))
    assert y.eq(0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert y.eq(0).unique(dim=0).shape[0] == 40


def test_the_partitioned_norm_is_each_domains_own_batch_norm_in_training_and_evaluation() -> None:
    torch.manual_seed(0)
    base = nn.BatchNorm1d(4, momentum=0.3)
    randomise(base.state_dict())
    context = DomainContext()
    norm = PartitionedNorm(base, N, context)
    plain = [nn.BatchNorm1d(4, momentum=0.3) for _ in range(N)]
    for own in plain:
        own.load_state_dict(base.state_dict())
    for step in range(3):
        x, ids = 3 * torch.randn(24, 4) + step, torch.randint(N, (24,))
        y = run(norm, context, x, ids)
        for domain, own in enumerate(plain):
            torch.testing.assert_close(y[ids == domain], own(x[ids == domain]), atol=1e-5, rtol=1e-5)
    norm.eval()
    x, ids = torch.randn(24, 4), torch.randint(N, (24,))
    y = run(norm, context, x, ids)
    for domain, own in enumerate(plain):
        torch.testing.assert_close(y[ids == domain], own.eval()(x[ids == domain]), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_had_once_per_domain() -> None:
    with pytest.raises(ValueError, match="a BatchNorm2d cannot be had once per domain: it keeps state, 'num_batches"):
        layer_bank(nn.BatchNorm2d(3), N)
    holder = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has a parameter 'weight' outside its layers"):
        replace_layers(holder, lambda layer: layer)
