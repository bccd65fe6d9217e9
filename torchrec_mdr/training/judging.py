"""What of a validation's result has to get better."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_mdr.metrics import Metrics
from torchrec_mdr.training.early_stopping import LogLosses

Floats = NDArray[np.float64]


def judged(result: Metrics, monitor: str, pooled_below: int = 0) -> tuple[float, Tensor, LogLosses]:
    """What has to get higher, over all rows and of each domain, float64 [N]; and the log losses that guard it.

    Args:
        result (Metrics): of a validation.
        monitor (str): see `StageConfig`.
        pooled_below (int): see `StageConfig`.

    Example::

        >>> from torchrec_mdr.metrics import DomainResult
        >>> sizes = {"F": (0.6, 40), "M": (0.9, 10), "X": (0.7, 99)}
        >>> domains = {name: DomainResult(auc, 0.5, rows) for name, (auc, rows) in sizes.items()}
        >>> result = Metrics(0.7, 0.6, 0.5, 149, domains)
        >>> judged(result, "auc")[1]
        tensor([0.6000, 0.9000, 0.7000], dtype=torch.float64)
        >>> judged(result, "auc", pooled_below=50)[1]
        tensor([0.6600, 0.6600, 0.7000], dtype=torch.float64)
    """
    rows = result.rows_per_domain
    losses = _pooled(result.logloss_per_domain, rows, pooled_below)
    guard = LogLosses(np.inf if result.logloss is None else result.logloss, torch.from_numpy(losses))
    if monitor == "logloss":
        return -guard.overall, -guard.per_domain, guard
    overall = result.auc if monitor == "auc" else result.mean_auc
    return overall or 0.0, torch.from_numpy(_pooled(result.auc_per_domain, rows, pooled_below)), guard


def _pooled(values: Floats, rows: NDArray[np.int64], below: int) -> Floats:
    """The values, with the mean of all domains of fewer rows, weighted by rows, in the place of each of theirs."""
    few = rows < below
    known = few & np.isfinite(values)
    if not known.any():
        return values
    return np.where(few, np.average(values[known], weights=rows[known]), values)
