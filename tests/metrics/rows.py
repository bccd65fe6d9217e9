"""Random rows of an evaluation, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchrec_mdr.metrics import DomainMetrics, GroupMetric, Metrics

NAMES = ("a", "b", "c", "d")
Rows = tuple[Tensor, ...]  # logits, labels, domain ids and, where there are some, weights


def make_rows(num_rows: int, seed: int = 0, decimals: int = 1, num_domains: int = 4) -> Rows:
    """Logits with many ties, labels that depend on them, domains of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, generator=generator) * 2).round(decimals=decimals)
    labels = (torch.rand(num_rows, generator=generator) < torch.sigmoid(logits / 2)).float()
    domain_ids = (torch.rand(num_rows, generator=generator) ** 2 * num_domains).long()
    return logits, labels, domain_ids


def add(metrics: DomainMetrics, rows: Rows, batch: int = 64) -> None:
    """Adds rows batch by batch; no rows are no batch."""
    for start in range(0, len(rows[0]), batch):
        metrics.update(*(column[start : start + batch] for column in rows))


def compute(
    rows: Rows, names: Sequence[str] = NAMES, batch: int = 64, metrics: Mapping[str, GroupMetric] | None = None
) -> Metrics:
    """The metrics of rows."""
    collected = DomainMetrics(names, metrics or {})
    add(collected, rows, batch)
    return collected.compute()


def label_places(logits: Tensor, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """A metric that depends on the order of all rows: the sum of the positives' places."""
    places = torch.arange(len(labels), dtype=torch.float64)
    return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, places * labels)
