"""What a method is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.stage import Stage


@dataclass(frozen=True)
class Method(ABC):
    """Options of one method: how it changes a backbone, and its stages."""

    route: ClassVar[Route]  # of the trained model
    paper: ClassVar[str] = "multilora"  # whose data protocol and settings it is published with, see Choice
    min_divisions: ClassVar[int] = 1
    max_divisions: ClassVar[int | None] = 1  # None: any number
    needs_backbone_targets: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = False
    stage_settings: ClassVar[Mapping[str, Any]] = {}  # defaults that it needs whatever the data, by dotted names

    @abstractmethod
    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """Puts the method's parts into a backbone.

        Args:
            backbone (nn.Module): may be changed in place; names of its parameters stay.
            targets (Sequence[str]): the layers that adapters may wrap, patterns over module names.
            divisions (Sequence[Division]): the natural one first; their number has been checked.
            context (DomainContext): where the parts find the rows' domains.

        Returns:
            nn.Module: the model, with the backbone's forward.

        Raises:
            ValueError: the method does not fit the backbone.
        """

    def check_divisions(self, divisions: Sequence[Division]) -> None:
        """Raises ValueError for a number of divisions that the method cannot work along."""
        name, count = type(self).__name__, len(divisions)
        if count < self.min_divisions:
            raise ValueError(
                f"{name} needs {self.min_divisions} divisions or more, not {count}; add --auxiliary_division"
            )
        if self.max_divisions is not None and count > self.max_divisions:
            raise ValueError(f"{name} works along one division, not {count}; leave out --auxiliary_division")

    def components(self, divisions: Sequence[Division]) -> list[str]:
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
