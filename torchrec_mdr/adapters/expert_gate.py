"""The gate of a mixture of experts: weights of all of them, or of the k that it scores highest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.bank import load_by_expert
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.domain_module import DomainModule
from torchrec_mdr.adapters.gate import GateModule

NO_WEIGHT = -30.0  # logit of an expert that no gate has been trained for
OWN_ALONE = "own_alone"  # name of the buffer that is 1 where the own experts have all the weight
GATE_DIM = 4  # width of the gate's domain embedding, as in the reference code
SCORES = 1 << 24  # scores of a top-k gate that are in memory at a time, 64 MiB


class ExpertGate(GateModule, DomainModule):
    """Softmax weights of the experts, from the row's domain and, by option, from the layer's input.

    Args:
        num_domains (int): N.
        num_experts (int): E; expert i is domain (i mod N)'s own.
        in_features (int | None): width of the input the gate also sees; None where it sees the domain only.
        falls_back (bool): whether its stage starts with each row's own experts alone, all of the same weight, and falls
            back on them where nothing that it learns is better. Training begins with the softmax nevertheless: next to
            the own experts, which have been fitted to the same rows, the others look worse than they are.
    """

    def __init__(self, num_domains: int, num_experts: int, in_features: int | None, falls_back: bool = False) -> None:
        super().__init__()
        self.num_domains = num_domains
        self.domain_embedding = nn.Parameter(torch.empty(num_domains, GATE_DIM))
        self.register_buffer(OWN_ALONE, torch.empty((), dtype=torch.int64) if falls_back else None)
        self.reset_parameters()
        self.linear = nn.Linear(GATE_DIM + (in_features or 0), num_experts)
        self.sees_input = in_features is not None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the domains' embeddings anew; the linear layer has a method of its own."""
        self.domain_embedding.normal_()
        self._set_own_alone(0)

    @torch.no_grad()
    def _set_own_alone(self, value: int) -> None:
        if self.own_alone is not None:
            self.get_buffer(OWN_ALONE).fill_(value)

    def start_stage(self, route: Route, division: int, domains: Tensor | None = None) -> None:
        """See :class:`DomainModule`: with the own experts, as the stage before has left them."""
        if route is Route.FUSED:
            self._set_own_alone(1)

    def leave_start(self) -> None:
        """See :class:`DomainModule`: for the softmax, in a stage that trains it."""
        if self.domain_embedding.requires_grad:
            self._set_own_alone(0)

    @property
    def follows_input(self) -> bool:
        """Whether weights depend on the layer's input, as the gate stands."""
        return self.sees_input and (self.own_alone is None or not bool(self.own_alone))

    def logits_per_domain(self) -> Tensor:
        """[N, E], what a domain adds to its experts' logits."""
        return F.linear(self.domain_embedding, self.linear.weight[:, :GATE_DIM], self.linear.bias)

    def per_domain(self) -> Tensor:
        """[N, E], the weights of a gate that sees the domain only; with zeros for the input otherwise."""
        ids = torch.arange(self.num_domains, device=self.domain_embedding.device)
        return self._or_own(torch.softmax(self.logits_per_domain(), dim=1), ids)

    def _or_own(self, weights: Tensor, ids: Tensor, experts: Tensor | None = None) -> Tensor:
        """Weights [R, K] of experts int64 [R, K], all E where left out; or what the own ones of domains have alone."""
        if self.own_alone is None:
            return weights
        num_domains, num_experts = self.num_domains, self.linear.out_features
        if experts is None:
            experts = torch.arange(num_experts, device=ids.device).unsqueeze(0)
        own = (experts % num_domains == ids.unsqueeze(1)).to(weights.dtype) * (num_domains / num_experts)
        return torch.where(self.get_buffer(OWN_ALONE) > 0, own, weights)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Layer input [B, in_features] and domains int64 [B] -> weights [B, E]."""
        if not self.sees_input:
            return self.per_domain().index_select(0, ids)
        seen = torch.cat([self.domain_embedding.index_select(0, ids), x], 1)
        return self._or_own(torch.softmax(self.linear(seen), dim=1), ids)

    def choose(self, x: Tensor | None, ids: Tensor, k: int, at_once: bool = False) -> tuple[Tensor, Tensor]:
        """The k experts of rows, their domains' own ones among them, and a softmax over these alone.

        Args:
            x (Tensor | None): layer input [R, in_features]; None where the gate does not see it.
            ids (Tensor): domains int64 [R].
            k (int): experts a row.
            at_once (bool): whether all scores [R, E] are computed at once, as what is compiled or traced wants it.

        Returns:
            tuple: experts int64 [R, k] and weights [R, k].
        """
        num_experts, num_domains = self.linear.out_features, self.num_domains
        seen = self.domain_embedding.index_select(0, ids)
        if self.sees_input:
            assert x is not None, "the gate sees the layer's input"
            seen = torch.cat([seen, x], 1)
        own = torch.stack([ids + first for first in range(0, num_experts, num_domains)], 1)
        block = num_experts if at_once else min(max(SCORES // max(len(ids), 1), 1), num_experts)
        experts = top_k_experts(seen, self.linear.weight, self.linear.bias, own, k, num_experts, block)
        logits = (F.embedding(experts, self.linear.weight) * seen.unsqueeze(1)).sum(2) + self.linear.bias[experts]
        return experts, self._or_own(torch.softmax(logits, dim=1), ids, experts)

    def follows_domains(self, name: str) -> bool:
        """See :class:`DomainModule`."""
        return name != OWN_ALONE

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, sources: Tensor) -> None:
        """See :class:`DomainModule`.

        A new domain looks like the mean of the old ones; its expert has no weight until the gate is trained again, or
        where own experts have all of it.
        """
        if name == "domain_embedding":
            super().load_old_domains(name, old, new, sources)
            return
        if name == "linear.bias":
            new.fill_(NO_WEIGHT)
        load_by_expert(old, new, sources)


@torch.no_grad()
def top_k_experts(
    seen: Tensor, weight: Tensor, bias: Tensor, own: Tensor, k: int, num_experts: int, block: int
) -> Tensor:
    """The k experts of each row: its own ones, then those of the highest scores ``weight seen_i + bias``.

    Args:
        seen (Tensor): [R, w], what the gate sees.
        weight (Tensor): [E, w].
        bias (Tensor): [E].
        own (Tensor): int64 [R, m], experts that are chosen whatever their scores.
        k (int): at least m, at most E.
        num_experts (int): E.
        block (int): experts whose scores [R, block] are in memory at a time.

    Returns:
        Tensor: int64 [R, k], in no order.

    Example::

        >>> weight, own = torch.tensor([[0.1], [0.9], [0.5], [0.7]]), torch.tensor([[0], [1]])
        >>> seen, bias = torch.tensor([[1.0], [-1.0]]), torch.zeros(4)
        >>> experts = top_k_experts(seen, weight, bias, own, 2, num_experts=4, block=3)
        >>> experts.sort().values.tolist()
        [[0, 1], [0, 1]]
    """
    best = best_scores = None
    for begin in range(0, num_experts, block):
        width, places = min(block, num_experts - begin), own - begin
        scores = F.linear(seen, weight[begin : begin + width], bias[begin : begin + width])
        first = torch.where((places >= 0) & (places < width), torch.inf, -torch.inf).to(scores.dtype)
        scores = scores.scatter_reduce(1, places.clamp(0, width - 1), first, "amax")
        scores, found = scores.topk(min(k, width), dim=1)
        found = found + begin
        if best is not None and best_scores is not None:
            scores, found = torch.cat([best_scores, scores], 1), torch.cat([best, found], 1)
            scores, order = scores.topk(min(k, begin + width), dim=1)
            found = found.gather(1, order)
        best, best_scores = found, scores
    assert best is not None, "there are experts"
    return best
