"""Exact AUC, WAUC, log loss and further metrics, in total and per domain, over the rows of all ranks."""

from torchrec_mdr.metrics.domain_metrics import DomainMetrics
from torchrec_mdr.metrics.group_metrics import GroupMetric, group_sums
from torchrec_mdr.metrics.results import DomainResult, Metrics

__all__ = ["DomainMetrics", "DomainResult", "GroupMetric", "Metrics", "group_sums"]
