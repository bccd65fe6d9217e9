"""A picture of what fusion and gates have learnt."""

from __future__ import annotations

from matplotlib.figure import Figure

from torchrec_mdr.storage import open_write
from torchrec_mdr.training.combination import Combination

MOST_DRAWN = 100  # domains in a picture


def draw_combination(combination: Combination, title: str, path: str) -> None:
    """Draws one picture a layer, domains down, components across.

    Args:
        combination (Combination): the weights.
        title (str): of the whole picture.
        path (str): PNG file to write.
    """
    means, domains, components = combination.means, combination.domains, combination.components
    width = max(2.5, 0.35 * len(components) + 1.5)
    height = max(2.5, 0.28 * len(domains) + 1.8)
    # without pyplot, which would choose the backend of the whole process
    figure = Figure(figsize=(width * len(means), height), layout="constrained")
    axes = figure.subplots(1, len(means), squeeze=False)
    for axis, (name, mean) in zip(axes[0], means.items(), strict=True):
        picture = axis.imshow(mean, aspect="auto", cmap="viridis", vmin=0.0)
        # names are texts, whatever $ is in them
        axis.set_title(name.removeprefix("backbone."), fontsize=8, parse_math=False)
        axis.set_xticks(range(len(components)), components, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(len(domains)), domains, fontsize=7, parse_math=False)
        axis.set_xlabel("component")
        figure.colorbar(picture, ax=axis, shrink=0.8)
    axes[0][0].set_ylabel("domain")
    figure.suptitle(title, fontsize=10, parse_math=False)
    with open_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
