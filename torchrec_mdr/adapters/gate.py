"""What combines several adapters of a layer for each row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.bank import LayerAdapter
from torchrec_mdr.adapters.domain_module import ParameterGroup


class GateModule(nn.Module):
    """A module that combines adapters: its own parameters form the group GATE."""

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.GATE


class CombiningAdapter(LayerAdapter):
    """A layer adapter that weighs several components for each row, and can say how.

    ``weights`` holds the weights of the last pass in evaluation mode, [B, K] for K components; None where there are
    none.
    """

    weights: Tensor | None = None

    def keep(self, weights: Tensor, positions: int = 1) -> None:
        """Remembers the weights [B * positions, K] of a pass in evaluation mode, as the mean over a row's positions.

        Compiled passes remember nothing, nor do copies and saved models.
        """
        if not torch.compiler.is_compiling():
            self.weights = None if self.training else mean_over_positions(weights.detach(), positions)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "weights"}


def mean_over_positions(weights: Tensor, positions: int) -> Tensor:
    """[B * positions, K], positions of a row one after the other -> [B, K]."""
    return weights if positions == 1 else weights.unflatten(0, (-1, positions)).mean(1)
