"""Each paper's layer against its equations, computed row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import randomise
from torchrec_mdr.adapters import expert_gate
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.backbones.layers import HiddenLayer, OverArch
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.ops.groups import BatchDomains

IN, HIDDEN, ROWS = 7, (6, 5), 14
AGE, GENDER, CITY = Division("age", 3), Division("gender", 2), Division("city", 2)
LayerOf = Callable[[HiddenLayer, Tensor, list[int]], Tensor]


class Adapted:
    """An over arch with a method's parts, every parameter and statistic random, and rows for it."""

    def __init__(self, method: Method, divisions: tuple[Division, ...] = (AGE,), batch_norm: bool = False) -> None:
        torch.manual_seed(0)
        self.context = DomainContext()
        plain = OverArch(IN, HIDDEN, batch_norm=batch_norm)
        self.model = method.wrap(plain, ["hidden.*.linear"], divisions, self.context)
        randomise(self.model.state_dict())
        self.model.eval()
        self.sizes = [division.num_domains for division in divisions]
        self.x = torch.randn(ROWS, IN)
        self.ids = torch.stack([torch.randint(size, (ROWS,)) for size in self.sizes], 1)

    def run(self, route: Route, division: int = 0, expert_index: int = 0) -> Tensor:
        with self.context.open(DomainState(route, BatchDomains.from_ids(self.ids, self.sizes), division, expert_index)):
            return self.model(self.x)

    def row_by_row(self, layer_of: LayerOf) -> Tensor:
        """The over arch for one row at a time; layer_of(layer, h, domains) is a hidden layer before its activation."""
        logits = []
        for h, domains in zip(self.x, self.ids.tolist(), strict=True):
            for layer in self.model.hidden:
                h = torch.relu(layer_of(layer, h, domains))
            logits.append(self.model.output.weight @ h + self.model.output.bias)
        return torch.stack(logits)


def base(layer: HiddenLayer, x: Tensor) -> Tensor:
    return layer.linear.weight @ x + layer.linear.bias


def normalised(bank: nn.Module, domain: int, h: Tensor) -> Tensor:
    """MultiLoRA, Eq. 9."""
    centred = h - bank.running_mean[domain]
    return bank.weight[domain] * centred / (bank.running_var[domain] + bank.eps) ** 0.5 + bank.bias[domain]


def scaled_part(layer: HiddenLayer, division: int, domain: int, x: Tensor) -> Tensor:
    """MultiLoRA, Eq. 7 and 8: s * (U (D x)) + b."""
    bank = layer.linear.adapter.banks[division]
    return bank.scale[domain] * (bank.lora_B[domain] @ (bank.lora_A[domain] @ x)) + bank.bias[domain]


def mlora(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
    bank, d = layer.linear.adapter, domains[0]
    h = base(layer, x) + bank.lora_B[d] @ (bank.lora_A[d] @ x) + bank.bias[d]
    if isinstance(layer.norm, nn.BatchNorm1d):
        h = nn.functional.batch_norm(
            h[None], layer.norm.running_mean, layer.norm.running_var, layer.norm.weight, layer.norm.bias
        )[0]
    return h


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("rank", [1, [4, 3], None])
def test_mlora(rank: int | list[int] | None, batch_norm: bool) -> None:
    adapted = Adapted(MLoRA(rank=rank), batch_norm=batch_norm)
    torch.testing.assert_close(adapted.run(Route.DOMAIN), adapted.row_by_row(mlora), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_single_lora(batch_norm: bool) -> None:
    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        h = base(layer, x) + scaled_part(layer, 0, domains[0], x)
        return normalised(layer.norm.domains[0], domains[0], h) if batch_norm else h

    adapted = Adapted(SingleLoRA(rank=3), batch_norm=batch_norm)
    torch.testing.assert_close(adapted.run(Route.DOMAIN), adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("division", [0, 1])
def test_multilora_along_one_division(division: int, batch_norm: bool) -> None:
    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        h = base(layer, x) + scaled_part(layer, division, domains[division], x)
        return normalised(layer.norm.domains[division], domains[division], h) if batch_norm else h

    adapted = Adapted(MultiLoRA(rank=3), (AGE, GENDER), batch_norm)
    ours = adapted.run(Route.DOMAIN, division=division)
    torch.testing.assert_close(ours, adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divisions", [(AGE, GENDER), (AGE, GENDER, CITY)])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("fusion", ["attention", "avg", "add"])
def test_multilora_fused(fusion: str, batch_norm: bool, divisions: tuple[Division, ...]) -> None:
    """Eq. 10 and 11."""
    adapted = Adapted(MultiLoRA(rank=3, fusion=fusion), divisions, batch_norm)
    combinations = list(product(*(range(size) for size in adapted.sizes)))

    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        h0 = base(layer, x)
        parts = [scaled_part(layer, v, domain, x) for v, domain in enumerate(domains)]
        if fusion == "attention":
            attention = layer.linear.adapter.attention
            q = attention.query @ h0
            scores = torch.stack([q @ (attention.key @ h) / 3**0.5 for h in parts])
            shares = scores.exp() / scores.exp().sum()
        else:
            shares = torch.full((len(parts),), 1.0 if fusion == "add" else 1 / len(parts))
        h = h0 + sum(share * part for share, part in zip(shares, parts, strict=True))
        return normalised(layer.norm.combinations, combinations.index(tuple(domains)), h) if batch_norm else h

    torch.testing.assert_close(adapted.run(Route.FUSED), adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)
    kept = [layer.linear.adapter.weights for layer in adapted.model.hidden]
    if fusion == "attention":  # what reports read: weights of each division for each row
        assert all(weights.shape == (ROWS, len(divisions)) for weights in kept)
        assert all(torch.allclose(weights.sum(1), torch.ones(ROWS)) for weights in kept)


@pytest.mark.parametrize("expert_index", [0, 1, 2])
def test_an_expert_of_moe_mlora_alone(expert_index: int) -> None:
    adapted = Adapted(MoEMLoRA(rank=2, experts_per_domain=3))

    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        bank, expert = layer.linear.adapter.bank, expert_index * AGE.num_domains + domains[0]
        return base(layer, x) + bank.lora_B[expert] @ (bank.lora_A[expert] @ x) + bank.bias[expert]

    ours = adapted.run(Route.DOMAIN, expert_index=expert_index)
    torch.testing.assert_close(ours, adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("gate_input", ["domain", "domain_and_input"])
@pytest.mark.parametrize("experts_per_domain", [1, 2, 3])
def test_moe_mlora(experts_per_domain: int, gate_input: str, per_layer: bool) -> None:
    method = MoEMLoRA(rank=2, experts_per_domain=experts_per_domain, gate_input=gate_input, per_layer=per_layer)
    adapted = Adapted(method)
    first = adapted.model.hidden[0]
    inputs: list[Tensor] = []  # of a row's first layer, which a common gate sees

    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        if layer is first:
            inputs.append(x)
        gate = (layer if per_layer else first).linear.adapter.gate
        seen = gate.domain_embedding[domains[0]]
        if gate_input == "domain_and_input":
            seen = torch.cat([seen, x if per_layer else inputs[-1]])
        scores = (gate.linear.weight @ seen + gate.linear.bias).exp()
        weights = scores / scores.sum()
        bank = layer.linear.adapter.bank
        experts = [bank.lora_B[i] @ (bank.lora_A[i] @ x) + bank.bias[i] for i in range(3 * experts_per_domain)]
        return base(layer, x) + sum(weight * part for weight, part in zip(weights, experts, strict=True))

    torch.testing.assert_close(adapted.run(Route.FUSED), adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)
    gates = [layer.linear.adapter.gate is not None for layer in adapted.model.hidden]
    assert gates == [True, per_layer]


def top_k_of_a_row(gate: nn.Module, seen: Tensor, own: list[int], k: int) -> list[tuple[float, int]]:
    """Weights and experts of one row: its own ones, then the highest scores; a softmax over these."""
    scores = [
        float((gate.linear.weight[i] @ seen + gate.linear.bias[i]).detach()) for i in range(len(gate.linear.bias))
    ]
    ranked = sorted(range(len(scores)), key=lambda i: (i not in own, -scores[i]))[:k]
    total = sum(math.exp(scores[i]) for i in ranked)
    return [(math.exp(scores[i]) / total, i) for i in ranked]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("gate_input", ["domain", "domain_and_input"])
@pytest.mark.parametrize(("experts_per_domain", "top_k"), [(1, 1), (1, 2), (2, 3), (3, 100)])
def test_a_top_k_gate(
    experts_per_domain: int, top_k: int, gate_input: str, per_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_gate, "SCORES", 2 * ROWS)  # two experts at a time, or more
    options = {"gate_input": gate_input, "per_layer": per_layer, "experts_per_domain": experts_per_domain}
    adapted = Adapted(MoEMLoRA(rank=2, top_k=top_k, **options))
    adapted.ids[3] = -1
    first = adapted.model.hidden[0]
    inputs: list[Tensor] = []

    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        if layer is first:
            inputs.append(x)
        if domains[0] < 0:
            return base(layer, x)
        gate = (layer if per_layer else first).linear.adapter.gate
        seen = gate.domain_embedding[domains[0]]
        if gate_input == "domain_and_input":
            seen = torch.cat([seen, x if per_layer else inputs[-1]])
        own = [domains[0] + AGE.num_domains * place for place in range(experts_per_domain)]
        bank = layer.linear.adapter.bank
        chosen = top_k_of_a_row(gate, seen, own, top_k)
        assert len(chosen) == min(top_k, 3 * experts_per_domain)
        return base(layer, x) + sum(w * (bank.lora_B[i] @ (bank.lora_A[i] @ x) + bank.bias[i]) for w, i in chosen)

    torch.testing.assert_close(adapted.run(Route.FUSED), adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)
    if top_k == 100:  # all of them: the paper's gate, and its gradients
        all_experts = Adapted(MoEMLoRA(rank=2, **options))
        all_experts.ids[3] = -1
        assert all_experts.model.state_dict().keys() == adapted.model.state_dict().keys()
        for one, other in zip(gradients(adapted), gradients(all_experts), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        kept = [model.model.hidden[0].linear.adapter.weights for model in (adapted, all_experts)]
        torch.testing.assert_close(kept[0], kept[1])


def gradients(adapted: Adapted) -> list[Tensor]:
    """Of gates and experts."""
    parameters = [value for name, value in adapted.model.named_parameters() if ".adapter." in name]
    return list(torch.autograd.grad(adapted.run(Route.FUSED).sin().sum(), parameters))


def gates_of(adapted: Adapted) -> list[expert_gate.ExpertGate]:
    return [module for module in adapted.model.modules() if isinstance(module, expert_gate.ExpertGate)]


@pytest.mark.parametrize("options", [{}, {"gate_input": "domain_and_input"}, {"per_layer": True}, {"top_k": 3}])
@pytest.mark.parametrize("experts_per_domain", [1, 2])
def test_a_stage_of_a_gate_that_falls_back_starts_with_the_own_experts(
    experts_per_domain: int, options: dict[str, Any]
) -> None:
    """And trains as if it did not; from the route of another stage it takes nothing."""
    method = MoEMLoRA(rank=2, experts_per_domain=experts_per_domain, **options)
    plain, adapted = Adapted(method), Adapted(replace(method, gate_start="own"))
    assert torch.equal(plain.run(Route.FUSED), adapted.run(Route.FUSED))
    for gate in gates_of(adapted):
        gate.start_stage(Route.DOMAIN, 0)
    assert torch.equal(plain.run(Route.FUSED), adapted.run(Route.FUSED))
    for gate in gates_of(adapted):
        gate.start_stage(Route.FUSED, 0)

    def layer_of(layer: HiddenLayer, x: Tensor, domains: list[int]) -> Tensor:
        bank, own = layer.linear.adapter.bank, range(domains[0], 3 * experts_per_domain, 3)
        parts = [bank.lora_B[i] @ (bank.lora_A[i] @ x) + bank.bias[i] for i in own]
        return base(layer, x) + sum(parts) / experts_per_domain

    torch.testing.assert_close(adapted.run(Route.FUSED), adapted.row_by_row(layer_of), rtol=1e-4, atol=1e-5)
    if experts_per_domain == 1:
        torch.testing.assert_close(adapted.run(Route.FUSED), adapted.run(Route.DOMAIN))
    for gate in gates_of(adapted):
        gate.requires_grad_(False).leave_start()  # in a stage that does not train it
        assert bool(gate.own_alone)
        gate.requires_grad_(True).leave_start()
    assert torch.equal(plain.run(Route.FUSED), adapted.run(Route.FUSED))
    for one, other in zip(gradients(plain), gradients(adapted), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", [MLoRA(rank=2), SingleLoRA(rank=2), MoEMLoRA(rank=2), MoEMLoRA(rank=2, top_k=2)])
def test_the_base_route_is_the_backbone_bitwise(method: Method) -> None:
    adapted = Adapted(method, batch_norm=True)
    plain = OverArch(IN, HIDDEN, batch_norm=True).eval()
    plain.load_state_dict({name: adapted.model.state_dict()[name] for name in plain.state_dict()})
    assert torch.equal(adapted.run(Route.BASE), plain(adapted.x))
