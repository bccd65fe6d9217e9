"""A metric: the share of rows whose logit is on the side of their label."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The accuracy of each group of rows.

    Args:
        logits (Tensor): float64 [B].
        labels (Tensor): int64 [B], 0 or 1.
        groups (Tensor): int64 [B], the group of each row.
        num_groups (int): number of groups.

    Returns:
        Tensor: float64 [num_groups]; NaN for a group without rows.
    """
    right = ((logits > 0) == (labels > 0)).double()
    sums = torch.zeros(2, num_groups, dtype=torch.float64, device=logits.device)
    sums[0].index_add_(0, groups, right)
    sums[1].index_add_(0, groups, torch.ones_like(right))
    return sums[0] / sums[1]
