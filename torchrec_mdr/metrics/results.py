"""What an evaluation gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchrec_mdr.metrics.group_metrics import GroupResults

MOST_LISTED = 10_000  # domains, above which `metrics.json` lists the largest alone
NUM_LISTED = 100  # of these
_FIGURES = ("auc", "logloss", "ne", "calibration")


@dataclass(frozen=True)
class DomainResult:
    """What one domain's rows give.

    Args:
        auc (float | None): None where the rows are of one class.
        logloss (float | None): mean binary cross-entropy; None without rows.
        rows (int): number of rows.
        ne (float | None): normalised entropy, TorchRec's NE: the log loss over that of the domain's own share of
            positives; None where the rows are of one class.
        calibration (float | None): mean predicted probability over mean label; None without a positive row.
        others (dict[str, float | None]): further metrics by name; None where undefined.
    """

    auc: float | None
    logloss: float | None
    rows: int
    ne: float | None = None
    calibration: float | None = None
    others: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The form in `metrics.json`."""
        own = {"auc": self.auc, "logloss": self.logloss, "rows": self.rows, "ne": self.ne}
        return {**own, "calibration": self.calibration, **self.others}


class DomainResults(Mapping[str, DomainResult]):
    """The results of all domains, in columns: a million of them as objects would take more room than the rows.

    Args:
        names (Sequence[str]): in id order.
        results (GroupResults): a number a domain.
        others (Mapping[str, np.ndarray]): further metrics, likewise.
    """

    def __init__(self, names: Sequence[str], results: GroupResults, others: Mapping[str, np.ndarray]) -> None:
        self.names = tuple(names)
        self.columns = {figure: np.asarray(getattr(results, figure), dtype=np.float64) for figure in _FIGURES}
        self.columns = {figure: np.where(np.isfinite(v), v, np.nan) for figure, v in self.columns.items()}
        self.rows = np.asarray(results.rows, dtype=np.int64)
        self.others = dict(others)
        self._places: dict[str, int] = {}

    def __getitem__(self, name: str) -> DomainResult:
        if not self._places:
            self._places = {known: place for place, known in enumerate(self.names)}
        return self.at(self._places[name])

    def at(self, place: int) -> DomainResult:
        """The result of a domain, by its id."""
        own = {figure: _number(column[place]) for figure, column in self.columns.items()}
        others = {name: _number(column[place]) for name, column in self.others.items()}
        return DomainResult(rows=int(self.rows[place]), others=others, **own)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class Metrics:
    """What the rows of an evaluation give.

    Args:
        auc (float | None): over all rows; None where they are of one class.
        wauc (float | None): sum_d n_d AUC_d / sum_d n_d over the domains that have an AUC (MLoRA); None without any.
        logloss (float | None): mean binary cross-entropy; None without rows.
        rows (int): number of rows.
        domains (Mapping[str, DomainResult]): by domain name, in id order.
        ne (float | None): normalised entropy over all rows, see :class:`DomainResult`.
        calibration (float | None): over all rows, see :class:`DomainResult`.
        others (dict[str, float | None]): further metrics over all rows, by name; None where undefined.
    """

    auc: float | None
    wauc: float | None
    logloss: float | None
    rows: int
    domains: Mapping[str, DomainResult]
    ne: float | None = None
    calibration: float | None = None
    others: dict[str, float | None] = field(default_factory=dict)

    @property
    def auc_per_domain(self) -> np.ndarray:
        """float64 [N], NaN where a domain has no AUC."""
        return self._column("auc")

    @property
    def logloss_per_domain(self) -> np.ndarray:
        """float64 [N], NaN where a domain has no rows."""
        return self._column("logloss")

    @property
    def rows_per_domain(self) -> np.ndarray:
        """int64 [N]."""
        if isinstance(self.domains, DomainResults):
            return self.domains.rows
        return np.array([domain.rows for domain in self.domains.values()], dtype=np.int64)

    def _column(self, figure: str) -> np.ndarray:
        if isinstance(self.domains, DomainResults):
            return self.domains.columns[figure]
        found = (getattr(domain, figure) for domain in self.domains.values())
        return np.array([np.nan if value is None else value for value in found], dtype=np.float64)

    @property
    def mean_auc(self) -> float | None:
        """Unweighted mean of the domains' AUC, over those that have one; MLoRA stops early on it."""
        auc = self.auc_per_domain
        return None if np.isnan(auc).all() else float(np.nanmean(auc))

    def listed_domains(self) -> list[str]:
        """Names of the domains that `metrics.json` lists, in id order: all, or those with most rows of very many."""
        if len(self.domains) <= MOST_LISTED:
            return list(self.domains)
        largest = np.sort(np.argsort(-self.rows_per_domain, kind="stable")[:NUM_LISTED])
        names = list(self.domains)
        return [names[place] for place in largest]

    def to_dict(self) -> dict[str, Any]:
        """The form in `metrics.json`."""
        total: dict[str, Any] = {"auc": self.auc, "wauc": self.wauc, "logloss": self.logloss, "rows": self.rows}
        total |= {"ne": self.ne, "calibration": self.calibration, **self.others}
        if len(self.domains) > MOST_LISTED:
            total["domains_summary"] = self._summary()
        return {**total, "domains": {name: self.domains[name].to_dict() for name in self.listed_domains()}}

    def _summary(self) -> dict[str, Any]:
        """What is said of very many domains in all."""
        rows, auc = self.rows_per_domain, self.auc_per_domain
        known = auc[np.isfinite(auc)]
        levels = (5, 25, 50, 75, 95)
        shown = dict(zip(map(str, levels), np.percentile(known, levels).tolist(), strict=True)) if len(known) else {}
        return {
            "domains": len(rows),
            "with_rows": int((rows > 0).sum()),
            "with_auc": len(known),
            "auc_percentiles": shown,
        }
