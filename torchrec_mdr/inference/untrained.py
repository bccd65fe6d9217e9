"""Rows of embedding tables that training never reached: those of unknown domains, where the domain is a feature."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.data.feature_files import has_features
from torchrec_mdr.inference.run import Run


def untrained_rows(run: Run) -> list[tuple[nn.Parameter, int]]:
    """Tables of a run's model, and in each the row of unknown domains, which no training row had.

    Args:
        run (Run): see :func:`~torchrec_mdr.inference.load_run`; without `features.yaml` nothing is known.
    """
    if not has_features(run.folder):
        return []
    # needs polars, which runs without raw rows do not
    from torchrec_mdr.data.features.plan import FeaturePlan

    plan = FeaturePlan.load(run.folder)
    domains = {division.column for division in plan.divisions}
    sizes = {division.name: len(division.names) for division in plan.divisions}
    users = Counter(feature.vocabulary for feature in plan.sparse)
    wanted: dict[str, int] = {}
    for feature in plan.sparse:
        if feature.kind == "domain" and feature.division is not None:
            known = sizes[feature.division]
            if feature.num_embeddings > known:
                wanted[feature.name] = known
        elif feature.column in domains and users[feature.vocabulary] == 1 and feature.unknown is not None:
            wanted[feature.name] = feature.unknown  # each domain of the training rows has an id of its own
    return [
        (tables.embedding_bags[config.name].weight, wanted[name])
        for tables in run.model.modules()
        if isinstance(tables, EmbeddingBagCollection)
        for config in tables.embedding_bag_configs()
        for name in config.feature_names
        if name in wanted
    ]
