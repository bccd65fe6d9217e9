"""Mix: one model for the rows of all domains (the first baseline of MultiLoRA's Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.stage import Stage, train_stage


@dataclass(frozen=True)
class Mix(Baseline):
    """The backbone as it is, trained on the rows of all domains together.

    Example::

        >>> [stage.name for stage in Mix().stages([Division("scenario", 3)])]
        ['train']
    """

    route: ClassVar[Route] = Route.BASE
    max_divisions: ClassVar[int | None] = None
    needs_backbone_targets: ClassVar[bool] = False

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """The one stage."""
        return [train_stage(Route.BASE)]
