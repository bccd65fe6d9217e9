"""Metrics of groups of rows: what a further metric looks like, and those that every evaluation has."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class GroupMetric(Protocol):
    """A metric beside those that every evaluation has: a function, or an object that is called like one.

    It is called once for all rows, as one group, and once by domain. Where rows have weights, they come as the keyword
    `weights`, float64 [B]; a metric without it cannot be used on such rows.
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


class GroupResults(NamedTuple):
    """What every evaluation has of each group: [num_groups] each, NaN where undefined; `weight` is that of its rows."""

    auc: np.ndarray
    logloss: np.ndarray
    ne: np.ndarray
    calibration: np.ndarray
    rows: np.ndarray
    weight: np.ndarray


def group_results(
    logits: Tensor, positive: Tensor, groups: Tensor, num_groups: int, weights: Tensor | None = None
) -> GroupResults:
    """AUC, log loss, normalised entropy, calibration and number of rows of each group.

    Normalised entropy is TorchRec's NE: the log loss over that of the group's own share of positives, predicted for
    each of its rows; a constant has 1, less is better (He et al., ADKDD 2014). Calibration is TorchRec's, too: the mean
    predicted probability over the mean label; best at 1.

    Equal logits of a group are counted together, as a run: so ties count half, and their order does not matter.

    Args:
        logits (Tensor): float64 [B], ascending within a group.
        positive (Tensor): int64 [B], 0 or 1.
        groups (Tensor): int64 [B], ascending, in [0, num_groups).
        num_groups (int): number of groups.
        weights (Tensor | None): float64 [B], how much each row counts; 1 each where left out, and then AUC is exact.
    """
    last_of_run = torch.ones_like(groups, dtype=torch.bool)
    last_of_run[:-1] = (groups[1:] != groups[:-1]) | (logits[1:] != logits[:-1])
    ends = last_of_run.nonzero().flatten()
    run_group, run_logit = groups[ends], logits[ends]
    run_rows = torch.diff(ends, prepend=ends.new_tensor([-1]))
    if weights is None:
        run_positives = torch.diff(positive.cumsum(0)[ends], prepend=ends.new_zeros(1))
        run_negatives = run_rows - run_positives
    else:
        run_positives = torch.segment_reduce(weights * positive, "sum", lengths=run_rows)
        run_negatives = torch.segment_reduce(weights * (1 - positive), "sum", lengths=run_rows)

    def per_group(values: Tensor) -> Tensor:
        if values.is_floating_point():
            return group_sums(values, run_group, num_groups)
        return values.new_zeros(num_groups).index_add_(0, run_group, values)

    positives, negatives = per_group(run_positives), per_group(run_negatives)
    in_groups_before = negatives.cumsum(0) - negatives
    negatives_below = run_negatives.cumsum(0) - run_negatives - in_groups_before[run_group]
    # Mann-Whitney's U, twice, in integers: no rounding
    double_u = per_group(run_positives * (2 * negatives_below + run_negatives))
    run_loss = -run_positives * F.logsigmoid(run_logit) - run_negatives * F.logsigmoid(-run_logit)
    loss = group_sums(run_loss, run_group, num_groups)
    predicted = group_sums(torch.sigmoid(run_logit) * (run_positives + run_negatives), run_group, num_groups)
    rows, weight = per_group(run_rows), positives + negatives
    auc = double_u.double() / (2 * positives * negatives)
    logloss, share = loss / weight, positives.double() / weight
    entropy = -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)
    ne = torch.where(entropy > 0, logloss / entropy, torch.nan)
    calibration = torch.where(positives > 0, predicted / positives, torch.nan)
    return GroupResults(*(values.cpu().numpy() for values in (auc, logloss, ne, calibration, rows, weight)))
