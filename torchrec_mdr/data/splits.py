"""Cuts rows into training, validation and test rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLIT_SEED = 2024

Ints = NDArray[np.integer[Any]]


def random_split(rows: int) -> dict[str, Ints]:
    """Cuts rows 80/10/10 at random, as public implementations do (docs/results.md).

    Args:
        rows (int): number of rows.

    Returns:
        dict[str, Ints]: the rows of each split, in random order.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(rows)
    first, second = int(0.8 * rows), int(0.1 * rows)
    return {"train": order[:first], "validation": order[first : first + second], "test": order[first + second :]}


def stratified_split(domains: Ints, labels: NDArray[np.bool_]) -> dict[str, Ints]:
    """Cuts rows 60/20/20 within each domain and label (MoE-MLoRA, data sets).

    Args:
        domains (Ints): [n], the rows' natural domains.
        labels (NDArray[np.bool_]): [n].

    Returns:
        dict[str, Ints]: the rows of each split, in random order.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    strata = (domains.astype(np.int64) * 2 + labels)[order]
    by_stratum = np.argsort(strata, kind="stable")
    sizes = np.bincount(strata)
    size = sizes[strata]
    place = np.empty(len(order), dtype=np.int64)
    place[by_stratum] = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[strata[by_stratum]]
    first, second = (size * 0.6).astype(np.int64), (size * 0.8).astype(np.int64)
    return {
        "train": order[place < first],
        "validation": order[(place >= first) & (place < second)],
        "test": order[place >= second],
    }
