"""MultiLoRA: adapters along several divisions, combined per row by attention (Song et al., CIKM 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.gate import CombiningAdapter, GateModule
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method, layer_rank
from torchrec_mdr.methods.stage import ADAPTERS, BACKBONE, EMBEDDINGS, GATE, Stage, adapt_stage, pretrain_stage
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import Base
from torchrec_mdr.ops.multi_bank import attention_weights, down_project, up_project

Fusion = Literal["attention", "avg", "add"]


class ScaledLoRABank(LoRABank):
    """``h = s * (U (D x)) + b`` per domain (MultiLoRA, Eq. 7 and 8), D is ``lora_A``, U ``lora_B``, s ``scale``.

    D and s are Gaussian, U and b zero, so that a new bank adds exactly zero. Args: see :class:`LoRABank`.
    """

    def __init__(self, num_adapters: int, in_features: int, out_features: int, rank: int, division: int = 0) -> None:
        super().__init__(num_adapters, in_features, out_features, rank, division)
        self.scale = nn.Parameter(torch.randn(num_adapters, out_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws D anew and sets U and b to zero."""
        nn.init.normal_(self.lora_A, std=self.in_features**-0.5)
        self.lora_B.zero_()
        self.bias.zero_()

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
        groups, query = state.domains.groups, None if self.attention is None else self.attention.query
        output, queries, inner = down_project(x, base, query, [bank.lora_A for bank in banks], groups)
        ups = [bank.up_table() for bank in banks]
        if self.attention is not None:
            inner, weights = self.attention(queries, inner, ups, groups)
            self.keep(weights)
        elif self.fusion == "avg":
            inner = inner / _num_known(groups)
        return up_project(output, inner, ups, groups)


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
