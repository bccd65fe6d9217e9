"""Metrics of groups of rows: what a further metric looks like, and AUC and log loss."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class GroupMetric(Protocol):
    """A metric beside AUC and log loss: a function, or an object that is called like one.

    It is called once for all rows, as one group, and once by domain.
    """

    def __call__(self, logits: Tensor, labels: Tensor, groups: Tensor, num_groups: int, /) -> Tensor:
        """Values of the groups.

        Args:
            logits (Tensor): float64 [B], ascending within a group.
            labels (Tensor): int64 [B], 0 or 1, ascending within equal logits of a group.
            groups (Tensor): int64 [B], ascending, in [0, num_groups).
            num_groups (int): number of groups; some may have no row.

        Returns:
            Tensor: float64 [num_groups], NaN where undefined.
        """


def group_sums(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Sums values by group, each group in its own order, and so always to the same bits.

    Args:
        values (Tensor): floating, [B].
        groups (Tensor): int64 [B], ascending, in [0, num_groups).
        num_groups (int): number of groups.

    Returns:
        Tensor: [num_groups].
    """
    lengths = groups.new_zeros(num_groups).index_add_(0, groups, torch.ones_like(groups))
    return torch.segment_reduce(values, "sum", lengths=lengths)


def auc_logloss_rows(
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
    loss = group_sums(run_loss, run_group, num_groups)
    rows = positives + negatives
    auc = double_u.double() / (2 * positives * negatives)
    return auc.cpu().numpy(), (loss / rows).cpu().numpy(), rows.cpu().numpy()
