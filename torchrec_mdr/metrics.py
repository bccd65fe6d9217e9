"""Exact AUC, WAUC and log loss, in total and per domain, over the rows of all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainResult:
    """What one domain's rows give; auc is None where they are of one class, logloss where there are none."""

    auc: float | None
    logloss: float | None
    rows: int


@dataclass(frozen=True)
class Metrics:
    """What the rows of an evaluation give.

    Args:
        auc (float | None): over all rows; None where they are of one class.
        wauc (float | None): sum_d n_d AUC_d / sum_d n_d over the domains that have an AUC (MLoRA); None without any.
        logloss (float | None): mean binary cross-entropy; None without rows.
        rows (int): number of rows.
        domains (dict[str, DomainResult]): by domain name, in id order.
    """

    auc: float | None
    wauc: float | None
    logloss: float | None
    rows: int
    domains: dict[str, DomainResult]

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
        return asdict(self)


class DomainMetrics:
    """Collects the rows of an evaluation and computes exact metrics from all of them.

    Ranks may hold different numbers of rows, or none. The result does not depend, not even in its last bit, on the
    rows' order or on how they lie on the ranks.

    Args:
        domain_names (Sequence[str]): names in id order.

    Raises:
        ValueError: two domains have one name.

    Example::

        >>> metrics = DomainMetrics(["F", "M"])
        >>> logits, labels = torch.tensor([0.1, 0.4, 0.4, 2.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> metrics.update(logits, labels, domain_ids=torch.tensor([0, 0, 1, 1]))
        >>> result = metrics.compute()
        >>> result.auc, result.domains["F"].auc
        (0.875, 1.0)
    """

    def __init__(self, domain_names: Sequence[str]) -> None:
        if len(set(domain_names)) != len(domain_names):
            raise ValueError(f"domain names must differ from each other: {', '.join(domain_names)}")
        self.domain_names = tuple(domain_names)
        self.reset()

    def reset(self) -> None:
        """Forgets the rows."""
        self._logits: list[Tensor] = []
        self._codes: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor, domain_ids: Tensor) -> None:
        """Adds the rows of a batch, without waiting for an accelerator.

        Args:
            logits (Tensor): [B] or [B, 1].
            labels (Tensor): 0 or 1, [B] or [B, 1].
            domain_ids (Tensor): int64 [B].
        """
        logits = logits.detach().flatten()
        assert logits.shape == labels.flatten().shape == domain_ids.shape, "one logit, label and domain a row"
        self._logits.append(logits)
        self._codes.append(domain_ids.long() * 2 + (labels.flatten() > 0.5))

    def compute(self) -> Metrics:
        """Computes the metrics of all ranks' rows; where a process group exists, every rank must call it.

        Returns:
            Metrics: the same on every rank.

        Raises:
            ValueError: a logit is not finite, or a domain id is outside the division; on every rank.
        """
        logits = torch.cat(self._logits).double() if self._logits else torch.empty(0, dtype=torch.float64)
        codes = torch.cat(self._codes) if self._codes else torch.empty(0, dtype=torch.int64)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._evaluate(logits, codes)
        cuda = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        # one exchange: the bits of the logits beside the codes
        rows = _gather_columns(torch.stack([logits.view(torch.int64), codes]).to(device))
        answer: list[Metrics | ValueError | None] = [None]
        if rows is not None:
            try:
                answer = [self._evaluate(rows[0].view(torch.float64), rows[1])]
            except ValueError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, device=device)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        assert answer[0] is not None
        return answer[0]

    def _evaluate(self, logits: Tensor, codes: Tensor) -> Metrics:
        domain_ids, positive = codes >> 1, codes & 1
        self._check(logits, domain_ids)
        logits, by_logit = torch.sort(logits)
        domain_ids, positive = domain_ids[by_logit], positive[by_logit]
        total_auc, total_logloss, total_rows = _auc_logloss_rows(logits, positive, torch.zeros_like(domain_ids), 1)
        # stable: within a domain the rows stay sorted by logit
        domain_ids, by_domain = torch.sort(domain_ids, stable=True)
        auc, logloss, rows = _auc_logloss_rows(
            logits[by_domain], positive[by_domain], domain_ids, len(self.domain_names)
        )
        known = ~np.isnan(auc)
        if not known.all():
            _note_missing(tuple(name for name, is_known in zip(self.domain_names, known, strict=True) if not is_known))
        return Metrics(
            auc=_number(total_auc[0]),
            wauc=float((rows * auc)[known].sum() / rows[known].sum()) if known.any() else None,
            logloss=_number(total_logloss[0]),
            rows=int(total_rows[0]),
            domains={
                name: DomainResult(_number(auc[d]), _number(logloss[d]), int(rows[d]))
                for d, name in enumerate(self.domain_names)
            },
        )

    def _check(self, logits: Tensor, domain_ids: Tensor) -> None:
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


def _auc_logloss_rows(
    logits: Tensor, positive: Tensor, groups: Tensor, num_groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC, log loss (NaN where undefined) and number of rows of each group.

    Equal logits of a group are counted together, as a run: so ties count half, and their order does not matter.

    Args:
        logits (Tensor): float64 [B], ascending within a group.
        positive (Tensor): int64 [B], 0 or 1.
        groups (Tensor): int64 [B], ascending, in [0, num_groups).
        num_groups (int): number of groups.
    """
    last_of_run = torch.ones_like(groups, dtype=torch.bool)
    last_of_run[:-1] = (groups[1:] != groups[:-1]) | (logits[1:] != logits[:-1])
    ends = last_of_run.nonzero().flatten()
    run_group, run_logit = groups[ends], logits[ends]
    run_rows = torch.diff(ends, prepend=ends.new_tensor([-1]))
    run_positives = torch.diff(positive.cumsum(0)[ends], prepend=ends.new_zeros(1))
    run_negatives = run_rows - run_positives

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add_(0, run_group, values)

    positives, negatives = per_group(run_positives), per_group(run_negatives)
    in_groups_before = negatives.cumsum(0) - negatives
    negatives_below = run_negatives.cumsum(0) - run_negatives - in_groups_before[run_group]
    # Mann-Whitney's U, twice, in integers: no rounding
    double_u = per_group(run_positives * (2 * negatives_below + run_negatives))
    run_loss = -run_positives * F.logsigmoid(run_logit) - run_negatives * F.logsigmoid(-run_logit)
    # each group is summed in its own order, and so always to the same bits
    loss = torch.segment_reduce(run_loss, "sum", lengths=per_group(torch.ones_like(run_group)))
    rows = positives + negatives
    auc = double_u.double() / (2 * positives * negatives)
    return auc.cpu().numpy(), (loss / rows).cpu().numpy(), rows.cpu().numpy()


def _gather_columns(values: Tensor) -> Tensor | None:
    """[C, n] on each rank, n its own -> [C, sum of n] on rank 0, None elsewhere."""
    world_size, on_first = dist.get_world_size(), dist.get_rank() == 0
    counts = [values.new_zeros(1) for _ in range(world_size)]
    dist.all_gather(counts, values.new_tensor([values.shape[1]]))
    sizes = [int(count) for count in counts]
    padded = F.pad(values, (0, max(sizes) - values.shape[1]))
    parts = [torch.empty_like(padded) for _ in sizes] if on_first else None
    dist.gather(padded, parts, dst=0)
    if parts is None:
        return None
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


@cache
def _note_missing(names: tuple[str, ...]) -> None:
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    logger.warning("%d domain(s) with rows of one class or none have no AUC and no part in WAUC: %s", len(names), shown)
