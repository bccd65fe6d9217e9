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
from torchrec_mdr.metrics.sorted_rows import SortedRows

logger = logging.getLogger(__name__)

# what rows become while they are collected; a float64 logit keeps its type, on all ranks once they meet
_STATES = {
    "logits": torch.float32,
    "labels": torch.uint8,
    "domain_ids": torch.int32,
    "weights": torch.float32,  # of a batch without weights, one 1 that stands for all of its rows
    "bad_labels": torch.float64,  # a batch's first: row, value; row -1 where all are good
}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_INT32 = torch.iinfo(torch.int32)
_OWN_KEYS = ("auc", "wauc", "logloss", "rows", "ne", "calibration", "domains")


class DomainMetrics(Metric):
    """Collects the rows of an evaluation and computes exact metrics from all of them; a torchmetrics metric.

    Ranks may hold different numbers of rows, or none. The result does not depend, not even in its last bit, on the
    rows' order or on how they lie on the ranks. Rows stay on their device: on one other than the CPU, call
    `.to(device)` first, as with every metric of torchmetrics, so that ranks without rows meet the others there.

    A row takes 9 bytes, 4 more with a weight or a float64 logit; while :meth:`compute` runs, every rank holds all
    ranks' rows, and 8 bytes for each beside them, some 40 with weights.

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
        weights = torch.ones((), device=labels.device).expand(labels.shape) if weights is None else weights.detach()
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
        if domain_ids.dtype == torch.int64:  # far outside is outside
            domain_ids = domain_ids.clamp(_INT32.min, _INT32.max)
        types = {**_STATES, "logits": torch.float32 if logits.dtype in _NARROW else torch.float64}
        rows = {"logits": logits, "labels": labels == 1, "domain_ids": domain_ids, "weights": weights}
        for name, values in {**rows, "bad_labels": bad_label}.items():
            # copies, since the caller may fill the same tensors with the next batch
            one = values[:1] if values.stride() == (0,) else values
            getattr(self, name).append(one.to(logits.device, types[name], copy=True).expand(len(values)))

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
        logits, labels, domain_ids = (self._rows(name) for name in ("logits", "labels", "domain_ids"))
        weights = self._rows("weights") if self._is_weighed() else None
        self._check(logits, domain_ids, weights)
        total = self._by_group(SortedRows(logits, labels, None, weights), ("all",))[0].at(0)
        by_domain, sizes = self._by_group(SortedRows(logits, labels, domain_ids, weights), self.domain_names)
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
            tuple: logits float32 or float64, labels uint8, domain ids int32 and weights float32, [n] each; not to be
            changed.
        """
        # as torchmetrics does around compute
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync):
            logits, labels, domain_ids = (self._rows(name).cpu().numpy() for name in ("logits", "labels", "domain_ids"))
            is_weighed = self._is_weighed()
            weights = self._rows("weights").cpu() if is_weighed else torch.ones(1).expand(len(logits))
        return logits, labels, domain_ids, weights.numpy()

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
        # torchmetrics' own would exchange no empty list, and other types; and would hold each column twice
        group = process_group or self.process_group
        kinds = torch.tensor([self._rows("logits").dtype == torch.float64, self._is_weighed()], device=self.device)
        is_double, is_weighed = torch.stack(dist_sync_fn(kinds.byte(), group=group)).bool().any(0).tolist()
        for name, kind in _STATES.items():
            if name == "weights" and not is_weighed:
                self.weights = [torch.ones((), device=self.device).expand(len(self._rows("logits")))]
                continue
            kind = torch.float64 if name == "logits" and is_double else kind
            setattr(self, name, dist_sync_fn(self._rows(name).to(kind), group=group))

    def _is_weighed(self) -> bool:
        """Whether a row of this rank, or of all once they are exchanged, weighs more or less than others."""
        different = [own[:1] if own.stride() == (0,) else own for own in self.weights]
        return bool(different) and bool((torch.cat(different) != 1).any())

    def _rows(self, name: str) -> Tensor:
        """A state in one tensor, where need be without rows: this rank's, or all ranks' once they are exchanged."""
        state = getattr(self, name)
        if not state:
            return torch.empty(0, dtype=_STATES[name], device=self.device)
        if len(state) > 1:
            state[:] = [torch.cat(state)]  # in place: the batches' own go, wherever else the list is known
        return state[0]

    def _by_group(self, rows: SortedRows, names: Sequence[str]) -> tuple[DomainResults, np.ndarray]:
        """The results of each group, by its name, and its weight."""
        num_groups = len(names)
        own = group_results(rows.blocks(), num_groups)
        others: dict[str, np.ndarray] = {}
        if self.metrics:
            logits, labels, groups, weights, _ = rows.whole()
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

    def _check(self, logits: Tensor, domain_ids: Tensor, weights: Tensor | None) -> None:
        good = None if weights is None else torch.isfinite(weights) & (weights >= 0)
        if weights is not None and good is not None and not good.all():
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
