"""Collects the rows of an evaluation on all ranks, and evaluates them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from torchrec_mdr.metrics.group_metrics import GroupMetric, group_results
from torchrec_mdr.metrics.results import DomainResults, Metrics

logger = logging.getLogger(__name__)

# what rows become while they are collected: one type on all ranks, whatever a batch comes in
_STATES = {
    "logits": torch.float64,
    "labels": torch.uint8,
    "domain_ids": torch.int64,
    "weights": torch.float32,
    "bad_labels": torch.float64,  # a batch's first: row, value; row -1 where all are good
}
_OWN_KEYS = ("auc", "wauc", "logloss", "rows", "ne", "calibration", "domains")


class DomainMetrics(Metric):
    """Collects the rows of an evaluation and computes exact metrics from all of them; a torchmetrics metric.

    Ranks may hold different numbers of rows, or none. The result does not depend, not even in its last bit, on the
    rows' order or on how they lie on the ranks. Rows stay on their device: on one other than the CPU, call
    `.to(device)` first, as with every metric of torchmetrics, so that ranks without rows meet the others there.

    Args:
        domain_names (Sequence[str]): names in id order.
        metrics (Mapping[str, GroupMetric]): further metrics by name, see :class:`GroupMetric`.
        **kwargs: torchmetrics' own, such as `process_group`.

    Raises:
        ValueError: two domains have one name, or a further metric has the name of one that is always there.

    Example::

        >>> metrics = DomainMetrics(["F", "M"])
        >>> logits, labels = torch.tensor([0.1, 0.4, 0.4, 2.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> metrics.update(logits, labels, domain_ids=torch.tensor([0, 0, 1, 1]))
        >>> result = metrics.compute()
        >>> result.auc, result.domains["F"].auc, round(result.ne, 3), round(result.calibration, 3)
        (0.875, 1.0, 0.829, 1.302)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, domain_names: Sequence[str], metrics: Mapping[str, GroupMetric] = {}, **kwargs: Any) -> None:
        # without a cache: a rank that has seen no new batch would answer from it and leave the others waiting
        super().__init__(**{"compute_with_cache": False, **kwargs})
        if len(set(domain_names)) != len(domain_names):
            raise ValueError(f"domain names must differ from each other: {', '.join(domain_names)}")
        for name in metrics:
            if name in _OWN_KEYS:
                raise ValueError(f"a further metric may not be named '{name}', as a part of every result is")
        self.domain_names = tuple(domain_names)
        self.metrics = dict(metrics)
        for name in _STATES:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, domain_ids: Tensor, weights: Tensor | None = None) -> None:
        """Adds the rows of a batch, without waiting for the accelerator that they lie on.

        Args:
            logits (Tensor): [B] or [B, 1].
            labels (Tensor): 0 or 1 in any type, [B] or [B, 1].
            domain_ids (Tensor): integers, [B] or [B, 1].
            weights (Tensor | None): how much each row counts, [B] or [B, 1], finite and not negative; 1 each where left
                out.

        Raises:
            ValueError: the shapes do not fit, or a label is neither 0 nor 1; such labels on an accelerator make
                :meth:`compute` raise it.
        """
        weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.detach()
        columns = {"logits": logits.detach(), "labels": labels, "domain_ids": domain_ids, "weights": weights}
        logits, labels, domain_ids, weights = (_column(name, values) for name, values in columns.items())
        if not len(logits) == len(labels) == len(domain_ids) == len(weights):
            raise ValueError(
                "a batch has one logit, one label, one domain id and one weight a row, not "
                f"{len(logits)}, {len(labels)}, {len(domain_ids)} and {len(weights)}"
            )
        if domain_ids.is_floating_point():
            raise ValueError(f"domain_ids must be integers, not {domain_ids.dtype}")
        if not len(logits):
            return
        bad_label = _first_bad_label(labels)
        if labels.device.type == "cpu":
            _check_labels(bad_label)
        rows = {"logits": logits, "labels": labels == 1, "domain_ids": domain_ids, "weights": weights}
        for name, values in {**rows, "bad_labels": bad_label}.items():
            # copies, since the caller may fill the same tensors with the next batch
            getattr(self, name).append(values.to(logits.device, _STATES[name], copy=True))

    def compute(self) -> Metrics:
        """Computes the metrics of all ranks' rows; where a process group exists, every rank must call it.

        Returns:
            Metrics: the same on every rank.

        Raises:
            ValueError: a label is neither 0 nor 1, a logit is not finite, a weight is negative or not finite, a domain
                id is outside the division, or a further metric gives something else than a number a group; on every
                rank.
        """
        _check_labels(self._rows("bad_labels"))
        columns = [self._rows(name) for name in ("logits", "labels", "domain_ids")]
        weights = self._rows("weights")
        self._check(columns[0], columns[2], weights)
        # sorted by domain, logit, label and weight, one stable sort after the other: the one order of these rows
        if bool((weights != 1).any()):
            columns = _sorted([*columns, weights], 3)
        logits, labels, domain_ids, *weighed = _sorted(_sorted(columns, 1), 0)
        labels, weighed = labels.long(), [values.double() for values in weighed]
        total = self._by_group(logits, labels, torch.zeros_like(domain_ids), ("all",), *weighed)[0].at(0)
        logits, labels, domain_ids, *weighed = _sorted([logits, labels, domain_ids, *weighed], 2)
        by_domain, sizes = self._by_group(logits, labels, domain_ids, self.domain_names, *weighed)
        return Metrics(
            auc=total.auc,
            wauc=self._wauc(by_domain, sizes),
            logloss=total.logloss,
            rows=total.rows,
            domains=by_domain,
            ne=total.ne,
            calibration=total.calibration,
            others=total.others,
        )

    def all_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All ranks' rows, rank by rank in the order they were added; every rank must call it.

        Returns:
            tuple: logits float64, labels uint8, domain ids int64 and weights float32, [n] each.
        """
        # as torchmetrics does around compute
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync):
            names = ("logits", "labels", "domain_ids", "weights")
            logits, labels, domain_ids, weights = (self._rows(name).cpu().numpy() for name in names)
        return logits, labels, domain_ids, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the rows of a batch and computes the metrics of these rows alone, on this rank; see :meth:`update`."""
        before = dict(self.__dict__)
        try:
            return super().forward(*args, **kwargs)
        except Exception:
            # torchmetrics has put the earlier rows aside by then, and would lose them
            self.__dict__.update(before)
            raise

    @contextmanager
    def sync_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """See torchmetrics, which would keep the other ranks' rows where :meth:`compute` raises."""
        try:
            with super().sync_context(*args, **kwargs):
                yield
        except Exception:
            self.unsync(self._is_synced)
            raise

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        # torchmetrics exchanges no empty list, and the other ranks would wait for this one
        for name in _STATES:
            setattr(self, name, [self._rows(name)])
        super()._sync_dist(dist_sync_fn, process_group)

    def _rows(self, name: str) -> Tensor:
        """A state in one tensor, where need be without rows: this rank's, or all ranks' once they are exchanged."""
        state = getattr(self, name)
        if isinstance(state, Tensor):
            return state
        return torch.cat(state) if state else torch.empty(0, dtype=_STATES[name], device=self.device)

    def _by_group(
        self, logits: Tensor, labels: Tensor, groups: Tensor, names: Sequence[str], weights: Tensor | None = None
    ) -> tuple[DomainResults, np.ndarray]:
        """The results of each group, by its name, and its weight; see :class:`GroupMetric` for the arguments."""
        num_groups = len(names)
        own = group_results(logits, labels, groups, num_groups, weights)
        others: dict[str, np.ndarray] = {}
        for name, metric in self.metrics.items():
            if weights is not None and "weights" not in signature(metric).parameters:
                raise ValueError(f"metric '{name}' takes no weights, and rows have some; give it a parameter 'weights'")
            weighed = {} if weights is None else {"weights": weights}
            values = metric(logits, labels, groups, num_groups, **weighed)
            if not isinstance(values, Tensor) or values.shape != (num_groups,):
                found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"metric '{name}' must give a tensor [{num_groups}], a number a group, not {found}")
            others[name] = values.double().cpu().numpy()
        return DomainResults(names, own, others), own.weight

    def _wauc(self, by_domain: DomainResults, sizes: np.ndarray) -> float | None:
        known = np.isfinite(by_domain.columns["auc"])
        if not known.all() and (not dist.is_initialized() or dist.get_rank() == 0):
            _note_missing(tuple(name for name, is_known in zip(self.domain_names, known, strict=True) if not is_known))
        auc = by_domain.columns["auc"][known]
        rows = sizes[known]
        return float((rows * auc).sum() / rows.sum()) if known.any() else None

    def _check(self, logits: Tensor, domain_ids: Tensor, weights: Tensor) -> None:
        good = torch.isfinite(weights) & (weights >= 0)
        if not good.all():
            raise ValueError(f"weights must be finite and not negative, but one is {float(weights[~good][0]):g}")
        outside = (domain_ids < 0) | (domain_ids >= len(self.domain_names))
        if outside.any():
            first = int(domain_ids[outside][0])
            raise ValueError(f"domain id {first} is outside the division's range [0, {len(self.domain_names)})")
        bad = ~torch.isfinite(logits)
        if bad.any():
            name = self.domain_names[int(domain_ids[bad][0])]
            raise ValueError(
                f"the logits of {int(bad.sum())} of {logits.numel()} evaluated rows are NaN or infinite, one of them "
                f"in domain '{name}'; the model has diverged: lower the learning rate or go back to a checkpoint"
            )


def _sorted(columns: list[Tensor], key: int) -> list[Tensor]:
    """Rows in the order of one of their columns; rows that are equal in it keep theirs."""
    values, order = torch.sort(columns[key], stable=True)
    return [values if place == key else column[order] for place, column in enumerate(columns)]


def _column(name: str, values: Tensor) -> Tensor:
    """[B] or [B, 1] -> [B]."""
    if values.dim() == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.dim() != 1:
        raise ValueError(f"{name} must have the shape [B] or [B, 1], not {list(values.shape)}")
    return values


def _first_bad_label(labels: Tensor) -> Tensor:
    """The row and the value of the first label that is neither 0 nor 1, or row -1; found without a wait. [B] -> [2]."""
    bad = (labels != 0) & (labels != 1)
    row = bad.to(torch.uint8).argmax(dim=0, keepdim=True)
    return torch.cat([torch.where(bad[row], row, -1).double(), labels[row].double()])


def _check_labels(bad_labels: Tensor) -> None:
    """Raises ValueError for the first of some batches' bad labels."""
    rows, values = bad_labels.view(-1, 2).unbind(1)
    found = rows >= 0
    if found.any():
        row, value = int(rows[found][0]), float(values[found][0])
        raise ValueError(f"labels must be 0 or 1, but row {row} of a batch (counted from 0) has the label {value:g}")


@cache
def _note_missing(names: tuple[str, ...]) -> None:
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    logger.warning("%d domain(s) with rows of one class or none have no AUC and no part in WAUC: %s", len(names), shown)
