"""What a layer is for one domain alone: the adapters' part as one low-rank product, for the layer's own weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext, DomainState, Route


@dataclass(frozen=True)
class Merging:
    """What a model is merged for.

    Args:
        route (Route): the way through adapted layers.
        domains (tuple[int, ...]): one of each division, -1 for an unknown one.
        cache (dict[str, Tensor]): what layers share, in the model's order, such as a common gate's weights.
    """

    route: Route
    domains: tuple[int, ...]
    cache: dict[str, Tensor] = field(default_factory=dict)


class LowRankPart(NamedTuple):
    """``up^T down x + bias``: down [R, in], up [R, out] and bias [out], in float64."""

    down: Tensor
    up: Tensor
    bias: Tensor

    @staticmethod
    def total(parts: Sequence[LowRankPart], weights: Sequence[float] | Tensor) -> LowRankPart:
        """The weighted sum of parts, at least one."""
        weighed = list(zip(parts, [float(weight) for weight in weights], strict=True))
        down, up = torch.cat([part.down for part, _ in weighed]), torch.cat([part.up * w for part, w in weighed])
        return LowRankPart(down, up, torch.stack([part.bias * w for part, w in weighed]).sum(0))


class AdaptedLayer:
    """Mixed into a module that stands in a layer's place and asks the context for the rows' domains."""

    context: DomainContext

    def enter(self) -> DomainState:
        """The state of the pass under way, which takes note that it has come through this layer."""
        state = self.context.state
        if state.called is not None:
            state.called.add(id(self))
        return state

    @abstractmethod
    def freeze(self, route: Route) -> nn.Module:
        """The layer as it serves on a route, see :mod:`torchrec_mdr.adapters.served`; nothing is shared with it."""

    @abstractmethod
    def merge(self, merging: Merging) -> nn.Module:
        """The plain layer that gives the same for one domain's rows; nothing is shared with it.

        Raises:
            ValueError: what the adapters add depends on the row.
        """
