"""What fusion and gates have learnt: how much each domain draws from each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend has to be chosen first)


class CombinationWeights:
    """Mean weights of the parts that a model's layers combine, per domain, over the rows of an evaluation.

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

    def compute(self) -> dict[str, np.ndarray]:
        """Per layer, float64 [N, K]: rows sum to 1; NaN for a domain without rows. Called by all ranks."""
        means: dict[str, np.ndarray] = {}
        for name, sums in self._sums.items():
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(sums)
            means[name] = (sums[:, :-1] / sums[:, -1:]).cpu().numpy()
        return means


def combination_table(means: dict[str, np.ndarray], domains: Sequence[str], parts: Sequence[str]) -> dict[str, Any]:
    """The weights in the form of `combination.json`: parts, and per layer and domain one weight a part."""
    return {
        "parts": list(parts),
        "layers": {
            name: {domain: [round(float(w), 6) for w in row] for domain, row in zip(domains, mean, strict=True)}
            for name, mean in means.items()
        },
    }


def draw_combination(
    means: dict[str, np.ndarray], domains: Sequence[str], parts: Sequence[str], title: str, path: str
) -> None:
    """Draws one picture a layer, domains down, parts across.

    Args:
        means (dict): per layer, [N, K].
        domains (Sequence[str]): names of the N domains.
        parts (Sequence[str]): names of the K parts.
        title (str): of the whole picture.
        path (str): PNG file to write.
    """
    width = max(2.5, 0.35 * len(parts) + 1.5)
    height = max(2.5, 0.28 * len(domains) + 1.8)
    figure, axes = plt.subplots(
        1, len(means), figsize=(width * len(means), height), squeeze=False, layout="constrained"
    )
    for axis, (name, mean) in zip(axes[0], means.items(), strict=True):
        picture = axis.imshow(mean, aspect="auto", cmap="viridis", vmin=0.0)
        axis.set_title(name.removeprefix("backbone."), fontsize=8)
        axis.set_xticks(range(len(parts)), parts, rotation=90, fontsize=7)
        axis.set_yticks(range(len(domains)), domains, fontsize=7)
        axis.set_xlabel("part")
        figure.colorbar(picture, ax=axis, shrink=0.8)
    axes[0][0].set_ylabel("domain")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
