"""Defaults of data sets that papers publish sizes for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrec_mdr.data.datasets.base import NEUTRAL_OPTIONS, Choice, paper_defaults

_RANKED = ("multilora", "single_lora")
_KEPT = ("embeddings.dim", "batch_size", "backbone_options.hidden", "backbone_options.batch_norm")


def published_defaults(choice: Choice, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A paper's settings with the sizes that it publishes for one data set.

    Args:
        choice (Choice): what defaults depend on. Recipe `paper` takes everything; `recommended`, for data that nothing
            was chosen on, takes sizes alone and leaves training at the neutral defaults.
        sizes (Mapping[str, Mapping[str, Any]]): by paper, options by dotted names. Those of methods go to methods that
            have them, and one rank a layer to `mlp` alone, whose layers it names.

    Example::

        >>> choice = Choice("multilora", "mlp", "multilora", None, "recommended")
        >>> published_defaults(choice, {"multilora": {"backbone_options.hidden": [64, 32]}})["backbone_options.hidden"]
        [64, 32]
    """
    values = paper_defaults(choice.paper) | dict(sizes.get(choice.paper, {}))
    if choice.method not in _RANKED or choice.backbone != "mlp":
        values.pop("method_options.rank", None)
    if choice.method not in ("mlora", "moe_mlora"):
        values.pop("method_options.alpha", None)
    if choice.recipe == "paper":
        return values
    kept = {name: value for name, value in values.items() if name in _KEPT or name.startswith("method_options.")}
    return kept | NEUTRAL_OPTIONS
