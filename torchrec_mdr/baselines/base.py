"""What baselines share: models that are trained from scratch in one stage, on every row's own domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.stage import Stage, train_stage


@dataclass(frozen=True)
class Baseline(Method):
    """A method of others that the papers' are compared with."""

    route: ClassVar[Route] = Route.DOMAIN
    is_baseline: ClassVar[bool] = True

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """See `Method.stages`: one, with the settings of pretraining."""
        return [train_stage()]
