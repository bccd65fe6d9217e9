"""A method: every domain scales and shifts every hidden layer, as FiLM does (Perez et al., AAAI 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters import Bank, DomainContext, DomainState, LayerAdapter, Route, inject
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.stage import Stage, adapt_stage, pretrain_stage
from torchrec_mdr.ops.low_rank import Base, LinearWeights


class FilmBank(Bank, LayerAdapter):
    """``(1 + scale_d) * (W x + b) + shift_d``; scale and shift are zero at the start.

    Args:
        num_domains (int): N.
        out_features (int): width of the layer's output.
    """

    def __init__(self, num_domains: int, out_features: int) -> None:
        super().__init__(num_domains)
        self.scale = nn.Parameter(torch.zeros(num_domains, out_features))
        self.shift = nn.Parameter(torch.zeros(num_domains, out_features))

    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """See `LayerAdapter.adapt`."""
        ids = state.groups(self.division).ids
        output = base(x) if isinstance(base, LinearWeights) else base
        assert output is not None, "a layer has an output"
        return output * (1 + self.scale.index_select(0, ids)) + self.shift.index_select(0, ids)


@dataclass(frozen=True)
class Film(Method):
    """Pretrain, then train a scale and a shift per domain and hidden layer."""

    route: ClassVar[Route] = Route.DOMAIN

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        inject(backbone, targets, lambda layer, width, out_features: FilmBank(num_domains, out_features), context)
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """See `Method.stages`."""
        return [pretrain_stage(), adapt_stage()]
