"""Metrics of groups of rows: what a further metric looks like, and those that every evaluation has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_mdr.metrics.sorted_rows import Block, runs_of


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


def group_results(blocks: Iterable[Block], num_groups: int) -> GroupResults:
    """AUC, log loss, normalised entropy, calibration and number of rows of each group.

    Normalised entropy is TorchRec's NE: the log loss over that of the group's own share of positives, predicted for
    each of its rows; a constant has 1, less is better (He et al., ADKDD 2014). Calibration is TorchRec's, too: the mean
    predicted probability over the mean label; best at 1.

    Equal logits of a group are counted together, as a run: so ties count half, and their order does not matter.
    Without weights AUC is exact: Mann-Whitney's U is a sum of integers.

    Args:
        blocks (Iterable[Block]): rows in order, such as :meth:`SortedRows.blocks`.
        num_groups (int): number of groups.
    """
    rows = torch.zeros(num_groups, dtype=torch.int64)
    # positives, negatives, twice U, and the sums of the losses and of the predictions
    sums = [rows.clone() for _ in range(3)] + [rows.double() for _ in range(2)]
    for block, runs in runs_of(blocks):
        if block.weights is not None:
            sums[:3] = [own.double() for own in sums[:3]]
        run_loss = -runs.positives * F.logsigmoid(runs.logits) - runs.negatives * F.logsigmoid(-runs.logits)
        predicted = torch.sigmoid(runs.logits) * (runs.positives + runs.negatives)
        double_u = runs.positives * (2 * runs.negatives_below + runs.negatives)
        groups, sizes = torch.unique_consecutive(runs.groups, return_counts=True)
        values = runs.rows, runs.positives, runs.negatives, double_u, run_loss, predicted
        for total, own in zip([rows, *sums], values, strict=True):
            _go_on(total, own, groups, sizes)
    positives, negatives, twice, loss, predictions = sums
    weight = positives + negatives
    auc = twice.double() / (2 * positives * negatives)
    logloss, share = loss / weight, positives.double() / weight
    entropy = -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)
    ne = torch.where(entropy > 0, logloss / entropy, torch.nan)
    calibration = torch.where(positives > 0, predictions / positives, torch.nan)
    return GroupResults(*(values.numpy() for values in (auc, logloss, ne, calibration, rows, weight)))


def _go_on(sums: Tensor, values: Tensor, groups: Tensor, sizes: Tensor) -> None:
    """Goes on with sums by group where the block before ended: to the same bits as all values in one go.

    Args:
        sums (Tensor): [num_groups] on the CPU, changed in place.
        values (Tensor): [R], group by group.
        groups (Tensor): int64 [G], the groups that have values, ascending.
        sizes (Tensor): int64 [G], how many each has.
    """
    own = groups.cpu()
    if values.is_floating_point():
        values = values.clone()
        values[0] += sums[own[0]].to(values.device)
        sums[own] = torch.segment_reduce(values, "sum", lengths=sizes).cpu()
    else:
        totals = values.cumsum(0)[sizes.cumsum(0) - 1]
        sums[own] += torch.diff(totals, prepend=totals.new_zeros(1)).cpu()
