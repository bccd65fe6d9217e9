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

HIGHEST_RANK = 2**16  # more than any layer is wide that has use of low ranks


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

    def keeps_backbone(self, divisions: Sequence[Division]) -> bool:
        """Whether the trained model still holds the backbone as it was pretrained on all rows: its BASE route."""
        stages = self.stages(divisions)
        later = [stage for stage in stages if stage.name != "pretrain"]
        return len(later) < len(stages) and all(stage.keeps_pretrained for stage in later)

    def serves_unknown_domains(self, divisions: Sequence[Division]) -> bool:
        """Whether the BASE route scores rows of domains that training did not know."""
        return self.route is Route.BASE or self.keeps_backbone(divisions)

    def components(self, divisions: Sequence[Division]) -> list[str]:
        """Names of what fusion or gates combine, in the order of their weights; none where nothing is combined."""
        return []

    def reads_all_adapters(self, stage: Stage) -> bool:
        """Whether each row of a stage goes through the adapters of all domains, so that every rank needs them all."""
        return False

    def reach(self) -> int | None:
        """Domains of the natural division whose adapters a row goes through at most, its own one; None for all."""
        return 1

    def adapters_per_row(self, stage: Stage) -> int:
        """How many of a bank's adapters a row of a stage goes through, where it does not go through all."""
        return 1

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
        ValueError: a rank below 1 or above HIGHEST_RANK, or fewer ranks than layers.
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
    if rank > HIGHEST_RANK:
        raise ValueError(f"rank must be at most {HIGHEST_RANK}, not {rank}; a rank above a layer's width adds nothing")
    return rank
