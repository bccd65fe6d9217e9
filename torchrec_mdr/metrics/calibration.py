"""TorchRec's calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_mdr.metrics.group_metrics import group_sums


def calibration(logits: Tensor, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Mean predicted probability over mean label; best at 1. NaN without a positive row."""
    predicted = group_sums(torch.sigmoid(logits), groups, num_groups)
    positives = group_sums(labels.double(), groups, num_groups)
    return torch.where(positives > 0, predicted / positives, torch.nan)
