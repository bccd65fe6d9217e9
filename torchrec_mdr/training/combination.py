"""What fusion and gates have learnt: how much each domain draws from each component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Combination:
    """Mean weights of components, per layer and domain.

    Args:
        means (dict[str, np.ndarray]): per layer, float64 [N, K]: rows sum to 1; NaN for a domain without rows.
        domains (tuple[str, ...]): names of the N domains.
        components (tuple[str, ...]): names of the K components.
    """

    means: dict[str, np.ndarray]
    domains: tuple[str, ...]
    components: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The form in `combination.json`."""
        return {
            "components": list(self.components),
            "layers": {
                name: {
                    domain: [round(float(w), 6) for w in row] for domain, row in zip(self.domains, mean, strict=True)
                }
                for name, mean in self.means.items()
            },
        }


class CombinationWeights:
    """Mean weights of the components that a model's layers combine, per domain, over the rows of an evaluation.

    Args:
        layers (Mapping[str, nn.Module]): modules with an attribute ``weights``, [B, K] of the last pass, by name.
        num_domains (int): N.
    """

    def __init__(self, layers: Mapping[str, nn.Module], num_domains: int) -> None:
        self.layers = layers
        self.num_domains = num_domains
        self._sums: dict[str, Tensor] = {}

    def update(self, domain_ids: Tensor) -> None:
        """Adds the rows of the last pass; domain_ids int64 [B]."""
        for name, layer in self.layers.items():
            weights = layer.weights
            if not isinstance(weights, Tensor):
                continue
            rows = torch.cat([weights, weights.new_ones(weights.shape[0], 1)], 1).double()
            if name not in self._sums:
                self._sums[name] = rows.new_zeros(self.num_domains, rows.shape[1])
            self._sums[name].index_add_(0, domain_ids, rows)

    def compute(self, domains: Sequence[str], components: Sequence[str]) -> Combination | None:
        """The means; None where no layer combines anything. Called by all ranks."""
        means: dict[str, np.ndarray] = {}
        for name, sums in self._sums.items():
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(sums)
            means[name] = (sums[:, :-1] / sums[:, -1:]).cpu().numpy()
        return Combination(means, tuple(domains), tuple(components)) if means else None
