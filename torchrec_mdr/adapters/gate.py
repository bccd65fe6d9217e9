"""What combines several adapters of a layer for each row."""

from __future__ import annotations

from typing import ClassVar

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

    def keep(self, weights: Tensor) -> None:
        """Remembers the weights [B, K] of a pass in evaluation mode; compiled passes remember nothing."""
        if not torch.compiler.is_compiling():
            self.weights = None if self.training else weights.detach()
