"""A sparsely gated mixture of experts: each row goes through k of them (Shazeer et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainState, Route
from torchrec_mdr.adapters.expert_gate import ExpertGate
from torchrec_mdr.adapters.gate import CombiningAdapter
from torchrec_mdr.adapters.merging import LowRankPart, Merging
from torchrec_mdr.adapters.served import ServedAdapter, ServedLowRank, ServedSingle
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import Base
from torchrec_mdr.ops.multi_bank import down_project, up_project

MOST_SHOWN = 1000  # experts, up to which the weights of a pass are kept for reports


@dataclass(frozen=True)
class ExpertChoice:
    """The experts that a pass's rows go through.

    Args:
        experts (Tensor | None): int64 [U], the distinct ones, ascending; None where places name experts themselves.
        groups (tuple[DomainGroups, ...]): the rows by the first of their k experts, the second, and so on: by places
            among the distinct ones.
        weights (Tensor): [R, k], zeros for a row without a domain.
        positions (int): rows of a layer's input that a row of the batch stands for, one after the other.
        by_input (bool): whether positions of a row may have chosen differently.
    """

    experts: Tensor | None
    groups: tuple[DomainGroups, ...]
    weights: Tensor
    positions: int
    by_input: bool

    def at(self, positions: int) -> ExpertChoice:
        """The choice for a layer that sees another number of positions a row.

        Raises:
            ValueError: positions of a row have chosen each for itself.
        """
        if positions == self.positions:
            return self
        if self.positions > 1 and self.by_input:
            raise ValueError(
                "layers that share a top-k gate see different numbers of positions a row, and each has chosen by its "
                "input; give each layer its gate by --method_options.per_layer true"
            )
        groups = tuple(
            DomainGroups.from_ids(own.ids[:: self.positions].repeat_interleave(positions), own.num_adapters)
            for own in self.groups
        )
        weights = self.weights[:: self.positions].repeat_interleave(positions, 0)
        return replace(self, groups=groups, weights=weights, positions=positions)


class TopKAdapter(CombiningAdapter):
    """The k experts of a layer that a gate chooses: ``base + sum_k g_k (B_k A_k x + b_k)``.

    Expert i works for domain i mod N; a row's own experts are always among its k. The experts that are in a batch are
    taken out of the bank, or looked up where it is sharded, so that a pass costs k experts a row whatever their number.

    Args:
        bank (LoRABank): E experts.
        gate (ExpertGate): the layer's own, or that of all.
        owns_gate (bool): whether the gate's parameters are held here; False in layers behind the first of a common one.
        common (bool): whether layers share one gate.
        top_k (int): k.
    """

    def __init__(self, bank: LoRABank, gate: ExpertGate, owns_gate: bool, common: bool, top_k: int) -> None:
        super().__init__()
        self.bank = bank
        self.common = common
        self.gate = gate if owns_gate else None
        self.top_k = top_k
        self._gates = (gate,)  # in a tuple, so that it is no child of every layer

    @property
    def chooses_before(self) -> bool:
        """Whether its gate can choose for all layers before a pass, by the domains alone."""
        return self.common and self.gate is not None and not self.gate.sees_input

    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """See :meth:`LayerAdapter.adapt`."""
        bank = self.bank
        if state.route is Route.DOMAIN:
            return bank.adapt(x, base, state)
        assert base is not None, "a layer has an output"
        (gate,) = self._gates
        if bank.table is not None and ("top_k", id(gate)) not in state.cache:
            raise ValueError(
                "with sharded banks, a top-k gate chooses before the pass: it sees the domain alone, and is common to "
                "all layers; leave out gate_input and per_layer, or take replicated banks"
            )
        if self.gate is not None and bank.table is None:
            state.cache["top_k", id(gate)] = self._choose(x, state.groups(0).ids, state)
        choice: ExpertChoice = state.cache["top_k", id(gate)].at(state.positions)
        if self.gate is not None and choice.experts is not None:
            self._keep(choice)
        if bank.table is not None:
            bank = state.cache["rows", bank.table]
        elif choice.experts is not None:
            bank = bank.over({role: rows[choice.experts] for role, rows in bank.row_tensors().items()})
        downs, ups = [bank.lora_A] * self.top_k, [bank.up_table()] * self.top_k
        output, _, inner = down_project(x, base, None, downs, choice.groups)
        return up_project(output, inner * choice.weights.unsqueeze(2), ups, choice.groups)

    def choose_rows(self, state: DomainState) -> tuple[Tensor, DomainGroups]:
        """The experts int64 [U] of a pass, for tables to look up, and the rows by the first of theirs."""
        choice = self._choose(None, state.domains.ids[:, 0], state)
        state.cache["top_k", id(self._gates[0])] = choice
        assert choice.experts is not None, "tables are neither compiled nor traced"
        return choice.experts, choice.groups[0]

    def _choose(self, x: Tensor | None, ids: Tensor, state: DomainState) -> ExpertChoice:
        """The choice for rows of domains int64 [R], -1 for none."""
        (gate,) = self._gates
        known, own = ids >= 0, ids.clamp(min=0)
        if torch.compiler.is_compiling() or isinstance(ids, torch.fx.Proxy):
            experts, weights = gate.choose(x, own, self.top_k, at_once=True)
            distinct, places, count = None, torch.where(known.unsqueeze(1), experts, -1), self.bank.num_adapters
        else:
            if gate.sees_input:
                experts, weights = gate.choose(x, own, self.top_k)
            else:  # once for each domain in the batch
                domains, rows = torch.unique(own, return_inverse=True)
                experts, weights = (found[rows] for found in gate.choose(None, domains, self.top_k))
            distinct, places = torch.unique(torch.where(known.unsqueeze(1), experts, -1), return_inverse=True)
            if distinct.numel() and distinct[0] < 0:
                distinct, places = distinct[1:], places - 1
            count = distinct.numel()
        groups = tuple(DomainGroups.from_ids(places[:, column], count) for column in range(self.top_k))
        return ExpertChoice(distinct, groups, weights * known.unsqueeze(1), state.positions, gate.sees_input)

    def _keep(self, choice: ExpertChoice) -> None:
        """Keeps the weights of all experts where there are few enough to be shown."""
        if self.bank.num_adapters > MOST_SHOWN or choice.experts is None:
            return
        places = torch.stack([own.ids for own in choice.groups], 1)
        experts = choice.experts[places.clamp(min=0)] if choice.experts.numel() else places.clamp(min=0)
        weights = choice.weights.detach()
        dense = weights.new_zeros(len(weights), self.bank.num_adapters).scatter_add_(1, experts, weights)
        self.keep(dense, choice.positions)

    @torch.no_grad()
    def freeze(self, route: Route) -> ServedAdapter:
        """See :meth:`LayerAdapter.freeze`: a domain's k experts, each times its weight, are one adapter of rank k r."""
        experts, weights = self._per_domain("served from a bundle")
        up = self.bank.applied_B().mT[experts] * weights[..., None, None]
        bias = (self.bank.bias[experts] * weights.unsqueeze(2)).sum(1)
        tables = {"down": self.bank.lora_A[experts].flatten(1, 2), "up": up.flatten(1, 2), "bias": bias}
        return ServedSingle(ServedLowRank(0, tables))

    def merge(self, merging: Merging) -> LowRankPart:
        """See :meth:`LayerAdapter.merge`."""
        domain = merging.domains[0]
        experts, weights = self._per_domain("merged", max(domain, 0))
        parts = [self.bank.merge(Merging(merging.route, (int(expert),))) for expert in experts[0]]
        return LowRankPart.total(parts, weights[0].double() * (domain >= 0))

    @torch.no_grad()
    def _per_domain(self, what: str, domain: int | None = None) -> tuple[Tensor, Tensor]:
        """Experts and weights of all domains, or of one."""
        (gate,) = self._gates
        if gate.sees_input:
            raise ValueError(
                f"a top-k gate that sees the layer's input chooses by the row, and cannot be {what}; "
                "train with --method_options.gate_input domain"
            )
        device = gate.domain_embedding.device
        domains = torch.arange(gate.domain_embedding.shape[0], device=device)
        return gate.choose(None, domains if domain is None else domains[domain : domain + 1], self.top_k)
