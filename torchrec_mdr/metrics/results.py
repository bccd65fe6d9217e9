"""What an evaluation gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DomainResult:
    """What one domain's rows give.

    Args:
        auc (float | None): None where the rows are of one class.
        logloss (float | None): mean binary cross-entropy; None without rows.
        rows (int): number of rows.
        others (dict[str, float | None]): further metrics by name; None where undefined.
    """

    auc: float | None
    logloss: float | None
    rows: int
    others: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The form in `metrics.json`."""
        return {"auc": self.auc, "logloss": self.logloss, "rows": self.rows, **self.others}


@dataclass(frozen=True)
class Metrics:
    """What the rows of an evaluation give.

    Args:
        auc (float | None): over all rows; None where they are of one class.
        wauc (float | None): sum_d n_d AUC_d / sum_d n_d over the domains that have an AUC (MLoRA); None without any.
        logloss (float | None): mean binary cross-entropy; None without rows.
        rows (int): number of rows.
        domains (dict[str, DomainResult]): by domain name, in id order.
        others (dict[str, float | None]): further metrics over all rows, by name; None where undefined.
    """

    auc: float | None
    wauc: float | None
    logloss: float | None
    rows: int
    domains: dict[str, DomainResult]
    others: dict[str, float | None] = field(default_factory=dict)

    @property
    def auc_per_domain(self) -> np.ndarray:
        """float64 [N], NaN where a domain has no AUC."""
        return np.array([np.nan if d.auc is None else d.auc for d in self.domains.values()], dtype=np.float64)

    @property
    def mean_auc(self) -> float | None:
        """Unweighted mean of the domains' AUC, over those that have one; MLoRA stops early on it."""
        auc = self.auc_per_domain
        return None if np.isnan(auc).all() else float(np.nanmean(auc))

    def to_dict(self) -> dict[str, Any]:
        """The form in `metrics.json`."""
        total = {"auc": self.auc, "wauc": self.wauc, "logloss": self.logloss, "rows": self.rows, **self.others}
        return {**total, "domains": {name: domain.to_dict() for name, domain in self.domains.items()}}
