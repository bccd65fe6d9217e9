"""Exact AUC, WAUC, log loss, NE, calibration and further metrics, in total and per domain, over all ranks' rows."""

from torchrec_mdr.metrics.domain_metrics import DomainMetrics
from torchrec_mdr.metrics.gains import Gain, Gains, paired_gains
from torchrec_mdr.metrics.group_metrics import GroupMetric, group_sums
from torchrec_mdr.metrics.results import DomainResult, Metrics

__all__ = [
    "DomainMetrics",
    "DomainResult",
    "Gain",
    "Gains",
    "GroupMetric",
    "Metrics",
    "group_sums",
    "paired_gains",
]
