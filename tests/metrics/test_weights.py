"""Weighted rows, against scikit-learn and against rows that are repeated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.metrics.rows import NAMES, add, compute, make_rows
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.metrics.group_metrics import group_sums


def weights_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 3


def test_equals_scikit_learn_with_weights() -> None:
    logits, labels, domain_ids = make_rows(1003)
    weights = weights_of(1003)
    result = compute((logits, labels, domain_ids, weights))
    probability, by_hand = torch.sigmoid(logits.double()), 0.0
    assert result.auc == pytest.approx(roc_auc_score(labels, logits, sample_weight=weights), rel=1e-9)
    assert result.logloss == pytest.approx(log_loss(labels, probability, sample_weight=weights), rel=1e-9)
    rate = float(np.average(labels, weights=weights))
    constant = log_loss(labels, np.full(1003, rate), sample_weight=weights)
    assert result.ne == pytest.approx(result.logloss / constant, rel=1e-6)
    assert result.calibration == pytest.approx(float(np.average(probability, weights=weights)) / rate, rel=1e-6)
    for d, name in enumerate(NAMES):
        mine = domain_ids == d
        auc = roc_auc_score(labels[mine], logits[mine], sample_weight=weights[mine])
        assert result.domains[name].auc == pytest.approx(auc, rel=1e-9)
        assert result.domains[name].rows == int(mine.sum())
        by_hand += auc * float(weights[mine].double().sum() / weights.double().sum())
    assert result.wauc == pytest.approx(by_hand, rel=1e-6)


def test_a_weight_of_two_is_the_row_twice_and_one_is_no_weight() -> None:
    rows = make_rows(300)
    counts = torch.arange(300) % 3
    twice, once = compute(tuple(column.repeat_interleave(counts) for column in rows)), compute((*rows, counts.float()))
    assert once.auc == pytest.approx(twice.auc) and once.ne == pytest.approx(twice.ne)
    assert once.rows == 300 and twice.rows == int(counts.sum())
    assert compute((*rows, torch.ones(300))) == compute(rows)


def test_the_order_of_rows_does_not_matter_in_the_last_bit() -> None:
    rows = (*make_rows(500), weights_of(500))
    for seed in range(3):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        assert compute(tuple(column[order] for column in rows), batch=37 + seed) == compute(rows)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(bad: float) -> None:
    metrics = DomainMetrics(NAMES)
    add(metrics, (*make_rows(10), torch.full((10,), bad)))
    with pytest.raises(ValueError, match="weights must be finite and not negative, but one is"):
        metrics.compute()


def test_further_metrics_take_weights_or_are_refused() -> None:
    def weight(logits, labels, groups, num_groups, weights):  # type: ignore[no-untyped-def]
        return group_sums(weights, groups, num_groups)

    def blind(logits, labels, groups, num_groups):  # type: ignore[no-untyped-def]
        return group_sums(logits, groups, num_groups)

    rows = (*make_rows(100), weights_of(100))
    assert compute(rows, metrics={"weight": weight}).others["weight"] == pytest.approx(float(rows[3].double().sum()))
    with pytest.raises(ValueError, match="metric 'blind' takes no weights, and rows have some"):
        compute(rows, metrics={"blind": blind})
