"""MoE-MLoRA: every MLoRA adapter is an expert, a gate weighs them (Yaggel et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule
from torchrec_mdr.adapters.gate import CombiningAdapter, GateModule
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method, layer_rank
from torchrec_mdr.methods.stage import GATE, Stage, adapt_stage, pretrain_stage
from torchrec_mdr.ops.low_rank import Base, LinearWeights

GateInput = Literal["domain", "domain_and_input"]
NO_WEIGHT = -30.0  # logit of an expert that no gate has been trained for
GATE_DIM = 4  # width of the gate's domain embedding, as in the reference code


class ExpertGate(GateModule, DomainModule):
    """Softmax weights of the experts, from the row's domain and, by option, from the layer's input.

    Args:
        num_domains (int): N.
        num_experts (int): E.
        in_features (int | None): width of the input the gate also sees; None where it sees the domain only.
    """

    def __init__(self, num_domains: int, num_experts: int, in_features: int | None) -> None:
        super().__init__()
        self.domain_embedding = nn.Parameter(torch.randn(num_domains, GATE_DIM))
        self.linear = nn.Linear(GATE_DIM + (in_features or 0), num_experts)
        self.sees_input = in_features is not None

    def per_domain(self) -> Tensor:
        """[N, E], the weights of a gate that sees the domain only; with zeros for the input otherwise."""
        weight = self.linear.weight[:, :GATE_DIM]
        return torch.softmax(F.linear(self.domain_embedding, weight, self.linear.bias), dim=1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Layer input [B, in_features] and domains int64 [B] -> weights [B, E]."""
        if not self.sees_input:
            return self.per_domain().index_select(0, ids)
        return torch.softmax(self.linear(torch.cat([self.domain_embedding.index_select(0, ids), x], 1)), dim=1)

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, num_domains: int) -> None:
        """See :class:`DomainModule`.

        A new domain looks like the mean of the old ones; its expert has no weight until the gate is trained again.
        """
        if name == "domain_embedding":
            new.copy_(old.mean(0).expand_as(new))
            new[: len(old)].copy_(old)
            return
        if name == "linear.bias":
            new.fill_(NO_WEIGHT)
        experts = len(new) // num_domains  # of a domain
        parts = old.view(experts, -1, *old.shape[1:])
        new.view(experts, -1, *new.shape[1:])[:, : parts.shape[1]].copy_(parts)


class MoEAdapter(CombiningAdapter):
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

    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """See :meth:`LayerAdapter.adapt`."""
        bank = self.bank
        if state.route is Route.DOMAIN:
            return bank.adapt(x, base, state)
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
            self.keep(weights)
            if self.common:
                state.cache["gate"] = weights
            return weights
        return state.cache["gate"]


@dataclass(frozen=True)
class MoEMLoRA(Method):
    """Pretrain, adapt each expert on its own domain, train the gate over frozen experts.

    Args:
        rank (int | list[int] | None): r, for all layers or one a layer; None for max(out // alpha, 1).
        alpha (int): MLoRA's temperature coefficient.
        experts_per_domain (int): the paper's Figure 2 has 1 to 4.
        gate_input (str): `domain`, or `domain_and_input`: the input of the layer (of the first one for a common gate).
        per_layer (bool): a gate of its own for each layer in place of one for all.

    Example::

        >>> [stage.name for stage in MoEMLoRA(experts_per_domain=2).stages([Division("gender", 2)])]
        ['pretrain', 'adapt', 'gate']
    """

    rank: int | list[int] | None = None
    alpha: int = 16
    experts_per_domain: int = 1
    gate_input: GateInput = "domain"
    per_layer: bool = False

    route: ClassVar[Route] = Route.FUSED
    paper: ClassVar[str] = "mlora"

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, not {self.alpha}")
        if self.experts_per_domain < 1:
            raise ValueError(f"experts_per_domain must be at least 1, not {self.experts_per_domain}")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        num_experts = num_domains * self.experts_per_domain

        def make_adapter(layer: int, in_features: int, out_features: int) -> MoEAdapter:
            rank = layer_rank(self.rank, layer, max(out_features // self.alpha, 1))
            seen = in_features if self.gate_input == "domain_and_input" else None
            gate = ExpertGate(num_domains, num_experts, seen) if self.per_layer or layer == 0 else None
            return MoEAdapter(LoRABank(num_experts, in_features, out_features, rank), gate, not self.per_layer)

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

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain, adapt in one pass per expert of a domain, gate."""
        gate = Stage("gate", "gate", frozenset({GATE}), Route.FUSED)
        return [pretrain_stage(), adapt_stage(expert_passes=self.experts_per_domain), gate]
