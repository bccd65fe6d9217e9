"""MultiLoRA: adapters along several divisions, combined per row by attention (Song et al., CIKM 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.gate import CombiningAdapter, GateModule
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.adapters.merging import LowRankPart, Merging
from torchrec_mdr.adapters.served import ServedAdapter, ServedLowRank, ServingPass
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method, layer_rank
from torchrec_mdr.methods.stage import ADAPTERS, BACKBONE, EMBEDDINGS, GATE, Stage, adapt_stage, pretrain_stage
from torchrec_mdr.ops.attention import UNKNOWN, attention_weights
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import Base
from torchrec_mdr.ops.multi_bank import down_project, up_project

Fusion = Literal["attention", "avg", "add"]


class ScaledLoRABank(LoRABank):
    """``h = s * (U (D x)) + b`` per domain (MultiLoRA, Eq. 7 and 8), D is ``lora_A``, U ``lora_B``, s ``scale``.

    D and s are Gaussian, U and b zero, so that a new bank adds exactly zero. Args: see :class:`LoRABank`.
    """

    def __init__(self, num_adapters: int, in_features: int, out_features: int, rank: int, division: int = 0) -> None:
        super().__init__(num_adapters, in_features, out_features, rank, division)
        self.scale = nn.Parameter(self.empty_rows(out_features))
        self._draw_scale()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws D and s anew and sets U and b to zero."""
        nn.init.normal_(self.lora_A, std=self.in_features**-0.5)
        self.lora_B.zero_()
        self.bias.zero_()
        if hasattr(self, "scale"):  # not yet there where the bank is built
            self._draw_scale()

    def _draw_scale(self) -> None:
        nn.init.normal_(self.scale)

    def applied_B(self) -> Tensor:  # noqa: N802, the papers' letter
        """[N, out_features, r], s * U: the tiny weights are scaled, not the activations."""
        return (self.lora_B.mT * self.scale.unsqueeze(1)).mT

    def factored_tables(self) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """See :class:`Bank`: D's alone, since U and s meet before the product."""
        return [(self.lora_A, None)]


class AttentionFusion(GateModule):
    """Weights of the divisions' adapters for each row (MultiLoRA, Eq. 10): their outputs are keys, the base the query.

    Args:
        out_features (int): width of the adapted layer's output.
        rank (int): width of queries and keys.
    """

    def __init__(self, out_features: int, rank: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(rank, out_features))
        self.key = nn.Parameter(torch.empty(rank, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws query and key anew."""
        nn.init.xavier_uniform_(self.query)
        nn.init.xavier_uniform_(self.key)

    def forward(
        self, queries: Tensor, inner: Tensor, ups: Sequence[Tensor], groups: Sequence[DomainGroups]
    ) -> tuple[Tensor, Tensor]:
        """Weighs each row's adapters.

        Keys come from the adapters' inner vectors, since W_K (U z + b) = (W_K U) z + W_K b: W_K meets the domains' tiny
        matrices, and not the rows.

        Args:
            queries (Tensor): [B, r], W_Q h0.
            inner (Tensor): [B, V, r + 1], see :func:`down_project`.
            ups (Sequence[Tensor]): [N, r + 1, out_features] of each division.
            groups (Sequence[DomainGroups]): the rows' domains under each division.

        Returns:
            tuple: inner times its weight [B, V, r + 1]; the weights [B, V].
        """
        key = self.key * self.key.shape[0] ** -0.5
        return attention_weights(queries, inner, [key @ up.mT for up in ups], groups)


class MultiLoRAAdapter(CombiningAdapter):
    """The banks of all divisions beside one layer, and their fusion.

    Args:
        banks (list[ScaledLoRABank]): one per division.
        fusion (str | None): `attention`, `avg`, `add`, or None for one division.
    """

    def __init__(self, banks: list[ScaledLoRABank], fusion: Fusion | None) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.fusion = fusion
        self.attention = AttentionFusion(banks[0].out_features, banks[0].rank) if fusion == "attention" else None

    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """See :meth:`LayerAdapter.adapt`."""
        banks = [bank for bank in self.banks if isinstance(bank, LoRABank)]
        if state.route is Route.DOMAIN:
            return banks[state.division].adapt(x, base, state)
        assert base is not None, "a layer has an output"
        present = [bank.present(state) for bank in banks]
        banks, groups = [bank for bank, _ in present], [own for _, own in present]
        query = None if self.attention is None else self.attention.query
        output, queries, inner = down_project(x, base, query, [bank.lora_A for bank in banks], groups)
        ups = [bank.up_table() for bank in banks]
        if self.attention is not None:
            inner, weights = self.attention(queries, inner, ups, groups)
            self.keep(weights, state.positions)
        elif self.fusion == "avg":
            inner = inner / _num_known(groups)
        return up_project(output, inner, ups, groups)

    @torch.no_grad()
    def freeze(self, route: Route) -> ServedAdapter:
        """See :meth:`LayerAdapter.freeze`: W_K has met the adapters once and for all."""
        banks = [bank for bank in self.banks if isinstance(bank, LoRABank)]
        if route is Route.DOMAIN:
            return banks[0].freeze(route)
        if self.attention is None:
            return ServedFusion([bank.freeze_bank() for bank in banks], self.fusion == "avg", None)
        key = self.attention.key * self.attention.key.shape[0] ** -0.5
        served = [bank.freeze_bank(key=key @ bank.up_table().mT) for bank in banks]
        return ServedFusion(served, False, self.attention.query)

    def merge(self, merging: Merging) -> LowRankPart:
        """See :meth:`LayerAdapter.merge`."""
        banks = [bank for bank in self.banks if isinstance(bank, LoRABank)]
        if merging.route is Route.DOMAIN:
            return banks[0].merge(merging)
        known = sum(domain >= 0 for domain in merging.domains)
        if self.attention is not None and known > 1:
            raise ValueError(
                "fusion by attention weighs the divisions by the row, so that no domain can be merged; "
                "train with --method_options.fusion avg or add, or serve the adapters from a bundle"
            )
        weight = 1 / max(known, 1) if self.fusion == "avg" else 1.0
        return LowRankPart.total([bank.merge(merging) for bank in banks], [weight] * len(banks))


class ServedFusion(ServedAdapter):
    """The banks of all divisions beside a layer that serves.

    Args:
        banks (list[ServedLowRank]): one a division, with a table ``key`` [1 + N, q, r + 1] where attention weighs them.
        mean (bool): whether the mean is added, over the divisions that know the row's domain, and not the sum.
        query (Tensor | None): [q, out], W_Q, where attention weighs them.
    """

    def __init__(self, banks: list[ServedLowRank], mean: bool, query: Tensor | None) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.mean = mean
        self.register_buffer("query", None if query is None else query.detach().clone())

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """See :class:`ServedAdapter`."""
        now = ServingPass.current()
        banks = [bank for bank in self.banks if isinstance(bank, ServedLowRank)]
        inner = [bank.project_down(x, now) for bank in banks]
        weights: Tensor | None = None
        known = now.rows > 0
        query = self._buffers["query"]
        if query is not None:
            queries = F.linear(base, query)
            pairs = zip(banks, inner, strict=True)
            scores = torch.stack(
                [_score(queries, z, bank.pick("key", now.rows[:, bank.division])) for bank, z in pairs], 1
            )
            weights = torch.softmax(torch.where(known, scores, UNKNOWN), dim=1) * known
        elif self.mean:
            weights = (known / known.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)
        y = base
        for place, (bank, z) in enumerate(zip(banks, inner, strict=True)):
            y = bank.project_up(y, z, None if weights is None else weights[:, place : place + 1], now)
        return y


def _score(queries: Tensor, z: Tensor, key: Tensor) -> Tensor:
    """``q_i . (key_i [z_i, 1])``: [B, q], [B, r] and [B, q, r + 1] -> [B]."""
    met = (key[:, :, :-1] * z.unsqueeze(1)).sum(2) + key[:, :, -1]
    return (queries * met).sum(1)


def _num_known(groups: Sequence[DomainGroups]) -> Tensor | int:
    """In how many divisions a row's domain is known, [B, 1, 1]; a number where that holds for all of them."""
    if not any(own.may_miss for own in groups):
        return len(groups)
    known = torch.stack([own.ids >= 0 for own in groups]).sum(0)
    return known.clamp(min=1).view(-1, 1, 1)


@dataclass(frozen=True)
class MultiLoRA(Method):
    """Pretrain, adapt along each division, fuse.

    Args:
        rank (int | list[int]): r of adapters and fusion, for all layers or one a layer.
        fusion (str): `attention` (the method), `avg` or `add` (the paper's ablations).
        schedule (str): `staged` is the paper's; `joint` trains everything in one stage.

    Example::

        >>> divisions = [Division("age3", 3), Division("gender", 2)]
        >>> [stage.name for stage in MultiLoRA().stages(divisions)]
        ['pretrain', 'adapt_age3', 'adapt_gender', 'fuse']
    """

    rank: int | list[int] = 8
    fusion: Fusion = "attention"
    schedule: Literal["staged", "joint"] = "staged"

    route: ClassVar[Route] = Route.FUSED
    min_divisions: ClassVar[int] = 2
    max_divisions: ClassVar[int | None] = None

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        inject_banks(backbone, targets, divisions, context, self.rank, self.fusion)
        return backbone

    def components(self, divisions: Sequence[Division]) -> list[str]:
        """The divisions."""
        return [division.name for division in divisions]

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain, one adapt stage per division, fuse."""
        if self.schedule == "joint":
            return [Stage("joint", "joint", frozenset({EMBEDDINGS, BACKBONE, ADAPTERS, GATE}), Route.FUSED)]
        adapt = [adapt_stage(f"adapt_{division.name}", v) for v, division in enumerate(divisions)]
        return [pretrain_stage(), *adapt, Stage("fuse", "fuse", frozenset({GATE}), Route.FUSED)]


@dataclass(frozen=True)
class SingleLoRA(Method):
    """MultiLoRA's ablation with one division and no fusion.

    Args:
        rank (int | list[int]): r, for all layers or one a layer.
        schedule (str): `staged` is the paper's; `joint` trains everything in one stage.
    """

    rank: int | list[int] = 8
    schedule: Literal["staged", "joint"] = "staged"

    route: ClassVar[Route] = Route.DOMAIN

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        inject_banks(backbone, targets, divisions, context, self.rank, None)
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain and adapt, or the one joint stage."""
        if self.schedule == "joint":
            return [Stage("joint", "joint", frozenset({EMBEDDINGS, BACKBONE, ADAPTERS}), Route.DOMAIN)]
        return [pretrain_stage(), adapt_stage()]


def inject_banks(
    backbone: nn.Module,
    targets: Sequence[str],
    divisions: Sequence[Division],
    context: DomainContext,
    rank: int | list[int],
    fusion: Fusion | None,
) -> None:
    """Puts one bank per division beside each targeted layer, and domain norms in place of batch norms."""

    def make_adapter(layer: int, in_features: int, out_features: int) -> MultiLoRAAdapter:
        r = layer_rank(rank, layer, 8)
        banks = [ScaledLoRABank(d.num_domains, in_features, out_features, r, v) for v, d in enumerate(divisions)]
        return MultiLoRAAdapter(banks, fusion)

    inject(backbone, targets, make_adapter, context, [division.num_domains for division in divisions])
