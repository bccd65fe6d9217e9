"""Rows in eight bytes each: sorted as torch and numpy sort their columns, in blocks that change no result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from tests.metrics.rows import make_rows
from torchrec_mdr.metrics.group_metrics import group_results
from torchrec_mdr.metrics.sorted_rows import Block, SortedRows, runs_of

EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0, 1.0000001, -1.0000001]


def columns(dtype: torch.dtype, num_rows: int = 2000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with ties and extremes, labels, domains and weights."""
    logits, labels, domains = make_rows(num_rows, seed=3)
    logits = logits.to(dtype)
    logits[: 10 * len(EXTREMES)] = torch.tensor(EXTREMES, dtype=dtype).repeat(10)
    weights = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    return logits, labels.to(torch.uint8), domains.int(), weights


def expected(logits: Tensor, labels: Tensor, domains: Tensor, weights: Tensor | None = None) -> list[np.ndarray]:
    """Numpy's order of the columns; equal zeros are zeros without a sign."""
    given = [domains.numpy(), logits.double().numpy() + 0.0, labels.numpy()]
    given += [] if weights is None else [weights.numpy()]
    order = np.lexsort(given[::-1])
    return [column[order] for column in given]


def joined(blocks: Iterator[Block]) -> list[np.ndarray]:
    parts = [(b.groups, b.logits, b.labels, *(() if b.weights is None else (b.weights,))) for b in blocks]
    return [torch.cat(own).numpy() for own in zip(*parts, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighed", [False, True])
def test_rows_are_sorted_as_numpy_sorts_them(dtype: torch.dtype, weighed: bool) -> None:
    logits, labels, domains, weights = columns(dtype)
    given = (logits, labels, domains, weights if weighed else None)
    for size in (1, 7, 4096):
        found = joined(SortedRows(*given).blocks(size))
        for own, other in zip(found, expected(*given), strict=True):
            np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("weighed", [False, True])
def test_places_say_where_a_row_lay(weighed: bool) -> None:
    logits, labels, domains, weights = columns(torch.float32)
    rows = SortedRows(logits, labels, domains, weights if weighed else None, places=True)
    for block in rows.blocks(100):
        assert torch.equal(domains[block.places].long(), block.groups)
        assert torch.equal(logits[block.places].double() + 0.0, block.logits)
        assert torch.equal(labels[block.places].long(), block.labels)
        assert block.weights is None or torch.equal(weights[block.places].double(), block.weights)


@pytest.mark.parametrize("weighed", [False, True])
def test_blocks_part_no_run_and_results_keep_their_bits(weighed: bool) -> None:
    logits, labels, domains, weights = columns(torch.float32)
    rows = SortedRows(logits.clamp(-9, 9), labels, domains, weights if weighed else None)
    whole = group_results([rows.whole()], 5)
    for size in (1, 10, 333):
        blocks = list(rows.blocks(size))
        assert len(blocks) > 5
        for one, other in zip(blocks, blocks[1:], strict=False):
            assert (one.groups[-1], one.logits[-1]) != (other.groups[0], other.logits[0])
        for own, known in zip(group_results(blocks, 5), whole, strict=True):
            np.testing.assert_allclose(own, known, rtol=1e-14)
        counted = group_results(blocks, 5)
        if not weighed:
            np.testing.assert_array_equal(counted.auc, whole.auc)


def test_runs_know_what_lies_below_them() -> None:
    logits, labels, domains, _ = columns(torch.float32, 500)
    for _, runs in runs_of(SortedRows(logits, labels, domains).blocks(20)):
        for place in range(len(runs.groups)):
            below = (domains == runs.groups[place]) & (logits < runs.logits[place])
            same = (domains == runs.groups[place]) & (logits == runs.logits[place])
            assert int(runs.positives_below[place]) == int(labels[below].sum())
            assert int(runs.negatives_below[place]) == int((1 - labels[below]).sum())
            assert int(runs.rows[place]) == int(same.sum())
            assert int(runs.positives[place]) == int(labels[same].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_blocks_give_what_scikit_learn_gives(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600_000, generator=generator, dtype=dtype)
    labels = (torch.rand(600_000, generator=generator) < torch.sigmoid(logits)).to(torch.uint8)
    found = group_results(SortedRows(logits, labels).blocks(), 1)
    assert found.auc[0] == pytest.approx(roc_auc_score(labels, logits), rel=1e-12)
    assert found.logloss[0] == pytest.approx(log_loss(labels, torch.sigmoid(logits.double())), rel=1e-12)
