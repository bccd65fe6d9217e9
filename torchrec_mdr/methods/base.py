"""What a method is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.stage import Stage


@dataclass(frozen=True)
class Method(ABC):
    """Options of one method: how it changes a backbone, and its stages."""

    route: ClassVar[Route]  # of the trained model
    needs_backbone_targets: ClassVar[bool] = True

    @abstractmethod
    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """Puts the method's parts into a backbone.

        Args:
            backbone (nn.Module): may be changed in place; names of its parameters stay.
            targets (Sequence[str]): the layers that adapters may wrap, patterns over module names.
            divisions (Sequence[Division]): the natural one first.
            context (DomainContext): where the parts find the rows' domains.

        Returns:
            nn.Module: the model, with the backbone's forward.

        Raises:
            ValueError: the method does not fit the backbone or the divisions.
        """

    def parts(self, divisions: Sequence[Division]) -> list[str]:
        """Names of what fusion or gates combine, in the order of their weights; none where nothing is combined."""
        return []

    @abstractmethod
    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """The stages in their order; each starts from its predecessor's checkpoint."""


def layer_rank(rank: int | Sequence[int] | None, layer: int, default: int) -> int:
    """The rank of one adapted layer, counted from 0.

    Args:
        rank (int | Sequence[int] | None): one for all layers, one a layer, or None for the default.
        layer (int): which layer.
        default (int): the method's own rule.

    Raises:
        ValueError: a rank below 1, or fewer ranks than layers.
    """
    if rank is None:
        return default
    if not isinstance(rank, int):
        if layer >= len(rank):
            raise ValueError(
                f"rank names {len(rank)} layers, but the backbone has more layers to adapt; give one rank a layer"
            )
        rank = rank[layer]
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    return rank
