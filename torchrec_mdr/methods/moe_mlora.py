"""MoE-MLoRA: every MLoRA adapter is an expert, a gate weighs them (Yaggel et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.bank import LayerAdapter, LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.domain_module import AllDomainsModule
from torchrec_mdr.adapters.expert_gate import GATE_DIM, ExpertGate
from torchrec_mdr.adapters.gate import CombiningAdapter, mean_over_positions
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.adapters.merging import LowRankPart, Merging
from torchrec_mdr.adapters.served import ServedAdapter, ServedBank, ServingPass
from torchrec_mdr.adapters.top_k import TopKAdapter
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method, layer_rank
from torchrec_mdr.methods.stage import GATE, Stage, adapt_stage, pretrain_stage
from torchrec_mdr.ops.low_rank import Base, LinearWeights

GateInput = Literal["domain", "domain_and_input"]
GateStart = Literal["random", "own"]


class MoEAdapter(CombiningAdapter, AllDomainsModule):
    """All experts of one layer: ``base + sum_i g_i (B_i A_i x + b_i)``, one dense product over the stacked experts.

    Expert i works for domain i mod N; on the DOMAIN route only the row's own expert of the active index does.

    Args:
        bank (LoRABank): E experts.
        gate (ExpertGate | None): the layer's own gate, or the common one in the first layer; None in the layers after.
        common (bool): whether layers share one gate.
    """

    def __init__(self, bank: LoRABank, gate: ExpertGate | None, common: bool) -> None:
        super().__init__()
        self.bank = bank
        self.gate = gate
        self.common = common

    def row_numbers(self, route: Route) -> int:
        """See :class:`AllDomainsModule`: what all experts make of it, and the same weighed."""
        return 2 * self.bank.num_adapters * self.bank.rank if route is Route.FUSED else 0

    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """See :meth:`LayerAdapter.adapt`."""
        bank = self.bank
        if state.route is Route.DOMAIN:
            return bank.adapt(x, base, state)
        if bank.table is not None:
            raise ValueError(
                "a gate weighs the experts of all domains, and sharded banks give those of the batch alone; load the "
                "checkpoint into a model with replicated banks, or take the option top_k"
            )
        weights = self._weights(x, state).unsqueeze(2)
        z = F.linear(x, bank.lora_A.flatten(0, 1)).unflatten(1, (bank.num_adapters, bank.rank))
        weighed = torch.cat([z * weights, weights], 2)  # b's weight is the gate's own
        output = base(x) if isinstance(base, LinearWeights) else base
        assert output is not None, "a layer has an output"
        return torch.addmm(output, weighed.flatten(1), bank.up_table().flatten(0, 1))

    def _weights(self, x: Tensor, state: DomainState) -> Tensor:
        if self.gate is not None:
            groups = state.groups(0)
            weights: Tensor = self.gate(x, groups.ids.clamp(min=0) if groups.may_miss else groups.ids)
            if groups.may_miss:
                weights = weights * (groups.ids >= 0).unsqueeze(1)
            self.keep(weights, state.positions)
            if self.common:
                state.cache["gate"] = weights, state.positions
            return weights
        weights, positions = state.cache["gate"]
        if positions != state.positions:  # the first layer sees another number of positions a row
            weights = mean_over_positions(weights, positions).repeat_interleave(state.positions, 0)
        return weights

    def freeze(self, route: Route) -> ServedAdapter:
        """See :meth:`LayerAdapter.freeze`."""
        return ServedExperts(self.bank, self.gate, self.common)

    def merge(self, merging: Merging) -> LowRankPart:
        """See :meth:`LayerAdapter.merge`."""
        domain = merging.domains[0]
        if self.gate is not None:
            if self.gate.follows_input:
                raise ValueError(
                    "the gate weighs the experts by the row, so that no domain can be merged; "
                    "train with --gate_input domain, or serve from a bundle"
                )
            merging.cache["gate"] = self.gate.per_domain().detach()[max(domain, 0)] * (domain >= 0)
        weights = merging.cache["gate"]
        experts = [self.bank.merge(Merging(merging.route, (expert,))) for expert in range(len(weights))]
        return LowRankPart.total(experts, weights)


class ServedExperts(ServedAdapter):
    """All experts of a layer that serves: what is a domain's own is its row of the gate.

    Args:
        bank (LoRABank): E experts, which are copied.
        gate (ExpertGate | None): see :class:`MoEAdapter`.
        common (bool): whether layers share one gate.
    """

    def __init__(self, bank: LoRABank, gate: ExpertGate | None, common: bool) -> None:
        super().__init__()
        self.shape = bank.num_adapters, bank.rank
        self.common = common
        self.register_buffer("down", bank.lora_A.detach().flatten(0, 1).clone())
        self.register_buffer("up", bank.applied_B().detach().mT.flatten(0, 1).contiguous())
        self.register_buffer("bias", bank.bias.detach().clone())
        self.register_buffer("by_input", None)
        self.bank: ServedBank | None = None
        if gate is not None:
            weights = gate.logits_per_domain() if gate.follows_input else gate.per_domain()
            self.bank = ServedBank(0, {"gate": weights})
            self.by_input = gate.linear.weight.detach()[:, GATE_DIM:].clone() if gate.follows_input else None

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """See :class:`ServedAdapter`."""
        weights = self._weights(x, ServingPass.current())
        z = F.linear(x, self.get_buffer("down")).unflatten(1, self.shape) * weights.unsqueeze(2)
        return base + (z.flatten(1) @ self.get_buffer("up") + weights @ self.get_buffer("bias"))

    def _weights(self, x: Tensor, now: ServingPass) -> Tensor:
        if self.bank is None:
            common: Tensor = now.cache["gate"]
            return common
        weights = self.bank.pick("gate", now.rows[:, 0]).to(x.dtype)
        if self.by_input is not None:
            known = (now.rows[:, :1] > 0).to(x.dtype)
            weights = torch.softmax(weights + F.linear(x, self.by_input), dim=1) * known
        if self.common:
            now.cache["gate"] = weights
        return weights


@dataclass(frozen=True)
class MoEMLoRA(Method):
    """Pretrain, adapt each expert on its own domain, train the gate over frozen experts.

    Args:
        rank (int | list[int] | None): r, for all layers or one a layer; None for max(out // alpha, 1).
        alpha (int): MLoRA's temperature coefficient.
        experts_per_domain (int): the paper's Figure 2 has 1 to 4.
        gate_input (str): `domain`, or `domain_and_input`: the input of the layer (of the first one for a common gate).
        per_layer (bool): a gate of its own for each layer in place of one for all.
        top_k (int | None): how many experts a row goes through: its domain's own, and those that the gate scores
            highest. None for all of them, as in the paper.
        gate_start (str): `random`, as in the paper; or `own`: the stage `gate` starts with each row's own experts
            alone, which is what the stage before came to, and falls back on them where no gate that it trains, from
            random values as ever, does better on validation rows.

    Example::

        >>> [stage.name for stage in MoEMLoRA(experts_per_domain=2).stages([Division("gender", 2)])]
        ['pretrain', 'adapt', 'gate']
    """

    rank: int | list[int] | None = None
    alpha: int = 16
    experts_per_domain: int = 1
    gate_input: GateInput = "domain"
    per_layer: bool = False
    top_k: int | None = None
    gate_start: GateStart = "random"

    route: ClassVar[Route] = Route.FUSED
    paper: ClassVar[str] = "mlora"

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, not {self.alpha}")
        if self.experts_per_domain < 1:
            raise ValueError(f"experts_per_domain must be at least 1, not {self.experts_per_domain}")
        if self.top_k is not None and self.top_k < self.experts_per_domain:
            raise ValueError(
                f"top_k is {self.top_k}, and must be {self.experts_per_domain} or more: each row goes through its "
                "domain's own experts (experts_per_domain)"
            )

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        num_experts = num_domains * self.experts_per_domain

        common: list[ExpertGate] = []

        def make_adapter(layer: int, in_features: int, out_features: int) -> LayerAdapter:
            rank = layer_rank(self.rank, layer, max(out_features // self.alpha, 1))
            seen = in_features if self.gate_input == "domain_and_input" else None
            owns_gate = self.per_layer or layer == 0
            falls_back = self.gate_start == "own"
            gate = ExpertGate(num_domains, num_experts, seen, falls_back) if owns_gate else common[0]
            if layer == 0:
                common.append(gate)
            bank = LoRABank(num_experts, in_features, out_features, rank)
            if self.top_k is not None:
                return TopKAdapter(bank, gate, owns_gate, not self.per_layer, min(self.top_k, num_experts))
            return MoEAdapter(bank, gate if owns_gate else None, not self.per_layer)

        inject(backbone, targets, make_adapter, context)
        return backbone

    def components(self, divisions: Sequence[Division]) -> list[str]:
        """The experts, by the domain each was trained on."""
        names = divisions[0].domain_names
        return [
            name if self.experts_per_domain == 1 else f"{name} #{expert_index + 1}"
            for expert_index in range(self.experts_per_domain)
            for name in names
        ]

    def reads_all_adapters(self, stage: Stage) -> bool:
        """See `Method.reads_all_adapters`: gates weigh all experts, or choose by what a layer sees."""
        by_domain = self.top_k is not None and self.gate_input == "domain" and not self.per_layer
        return stage.route is Route.FUSED and not by_domain

    def reach(self) -> int | None:
        """See `Method.reach`: where a gate chooses by the domain, its own and those of K - 1 other experts."""
        return self.top_k if self.gate_input == "domain" else None

    def adapters_per_row(self, stage: Stage) -> int:
        """See `Method.adapters_per_row`: K experts behind a top-k gate."""
        return self.top_k if self.top_k is not None and stage.route is Route.FUSED else 1

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain, adapt in one pass per expert of a domain, gate."""
        gate = Stage("gate", "gate", frozenset({GATE}), Route.FUSED, begins_elsewhere=self.gate_start == "own")
        return [pretrain_stage(), adapt_stage(expert_passes=self.experts_per_domain), gate]
