"""MLoRA: one low-rank adapter per domain in every hidden layer (Yang et al., arXiv 2408.08913)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.injection import inject
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method, layer_rank
from torchrec_mdr.methods.stage import ADAPTERS, BACKBONE, EMBEDDINGS, Stage, adapt_stage, pretrain_stage


@dataclass(frozen=True)
class MLoRA(Method):
    """``h = act(dropout(W x + b) + B_d A_d x + b_d)`` in every hidden layer, d the row's domain.

    Args:
        rank (int | list[int] | None): r, for all layers or one a layer; None for the paper's max(out // alpha, 1).
        alpha (int): the paper's temperature coefficient: 4 to 256 by data set and backbone.
        schedule (str): `two_phase` trains the backbone, then the adapters alone; `joint` everything in one stage.

    Example::

        >>> [stage.name for stage in MLoRA(rank=8).stages([Division("scenario", 12)])]
        ['pretrain', 'adapt']
    """

    rank: int | list[int] | None = None
    alpha: int = 16
    schedule: Literal["two_phase", "joint"] = "two_phase"

    route: ClassVar[Route] = Route.DOMAIN
    paper: ClassVar[str] = "mlora"

    def __post_init__(self) -> None:
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, not {self.alpha}")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""

        def make_adapter(layer: int, in_features: int, out_features: int) -> LoRABank:
            rank = layer_rank(self.rank, layer, max(out_features // self.alpha, 1))
            return LoRABank(divisions[0].num_domains, in_features, out_features, rank)

        inject(backbone, targets, make_adapter, context)
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain and adapt, or the one joint stage."""
        if self.schedule == "joint":
            return [Stage("joint", "joint", frozenset({EMBEDDINGS, BACKBONE, ADAPTERS}), Route.DOMAIN)]
        return [pretrain_stage(), adapt_stage()]
