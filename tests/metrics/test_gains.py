"""Gains of one model over another, against the bootstrap and a loop over pairs of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from tests.metrics.rows import NAMES, add, make_rows
from tests.ranks import RankPool
from torchrec_mdr.metrics import DomainMetrics, Gains, paired_gains
from torchrec_mdr.metrics.gains import Gain, auc_gain, auc_gains, domain_offsets, logloss_gain


def two_models(rows: int, seed: int = 0, better: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of two models that err alike, the first a little less, with ties; and labels."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.3).astype(np.int64)
    before = labels + rng.normal(0, 1.5, rows)
    after = before + better * labels + rng.normal(0, 0.5, rows)
    return after.round(1), before.round(1), labels


def test_the_difference_is_that_of_scikit_learn_and_the_interval_the_bootstraps() -> None:
    after, before, labels = two_models(1500)
    gain = auc_gain(after, before, labels)

    def statistic(rows: np.ndarray) -> float:
        return float(roc_auc_score(labels[rows], after[rows]) - roc_auc_score(labels[rows], before[rows]))

    rows = np.arange(len(labels))
    assert gain.difference == pytest.approx(statistic(rows), abs=1e-12)
    other = stats.bootstrap((rows,), statistic, n_resamples=999, vectorized=False, method="basic", rng=0)
    assert gain.low == pytest.approx(other.confidence_interval.low, abs=2e-3)
    assert gain.high == pytest.approx(other.confidence_interval.high, abs=2e-3)
    assert gain.high - gain.low == pytest.approx(np.ptp(other.confidence_interval), rel=0.1)
    # the models err alike: unpaired, the interval would be several times as wide
    alone = auc_gain(after, np.zeros(len(after)), labels)
    assert gain.high - gain.low < 0.6 * (alone.high - alone.low)


def test_an_interval_holds_nothing_in_nineteen_of_twenty_trials() -> None:
    """Two models that are equally good, in 400 data sets of 200 rows."""
    held = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        labels = (rng.random(200) < 0.3).astype(np.int64)
        gain = auc_gain(labels + rng.normal(0, 1, 200), labels + rng.normal(0, 1, 200), labels)
        held += gain.low < 0 < gain.high
    assert 0.92 < held / 400 < 0.98


def test_log_loss_is_paired_by_row() -> None:
    after, before, labels = two_models(500)
    gain = logloss_gain(after, before, labels)
    losses = (log_loss(labels, 1 / (1 + np.exp(-logits))) for logits in (after, before))
    expected = next(losses) - next(losses)
    assert gain.difference == pytest.approx(expected) and gain.low < gain.difference < gain.high


def test_few_rows_one_class_and_equal_scores() -> None:
    after, before, labels = two_models(400)
    assert auc_gain(after, before, np.zeros_like(labels)).difference is None
    few = np.flatnonzero(labels)[:9]
    some = np.concatenate([few, np.flatnonzero(labels == 0)])
    gain = auc_gain(after[some], before[some], labels[some])
    assert gain.difference is not None and gain.low is None and gain.p is None
    assert auc_gain(after, 2 * after, labels) == type(gain)(0.0, 0.0, 0.0)
    assert auc_gain(after[some], 2 * after[some], labels[some]) == type(gain)(0.0, 0.0, 0.0)


def test_models_that_order_all_rows_alike_gain_nothing_for_sure() -> None:
    """Domains of few rows, too, do not widen the interval of the weighted mean then."""
    rows = make_rows(60)
    gains = paired_gains(collected(rows), collected(rows))
    assert {gains.wauc, *gains.domains.values()} == {Gain(0.0, 0.0, 0.0)}


def collected(rows: tuple[torch.Tensor, ...], noise: float = 0.0) -> DomainMetrics:
    metrics = DomainMetrics(NAMES)
    add(metrics, (rows[0] + noise * rows[1], rows[1], rows[2]))
    return metrics


def placements(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair by pair: the share of the negatives below each positive, and of the positives above each negative."""
    above = np.sign(scores[labels == 1][:, None] - scores[labels == 0][None]) / 2 + 0.5
    return above.mean(1), above.mean(0)


def test_domains_at_once_are_those_of_a_loop() -> None:
    """Domains of no row to hundreds, of one class, with ties, and one of which both models think alike."""
    after, before, labels = two_models(6000)
    rng = np.random.default_rng(1)
    domains = np.minimum(rng.geometric(0.02, len(labels)), 150)
    labels[domains == 3] = 0
    after[domains == 5] = before[domains == 5]
    found = auc_gains(after, before, labels, domains, 152)
    kinds = set()
    for domain, gain in enumerate(found):
        own = domains == domain
        if not 0 < labels[own].sum() < own.sum():
            assert gain == Gain(None)
            continue
        pairs = zip(placements(after[own], labels[own]), placements(before[own], labels[own]), strict=True)
        positives, negatives = (one - other for one, other in pairs)
        kinds.add((gain.low is None, gain.p is None))
        assert gain.difference == pytest.approx(positives.mean(), abs=1e-12)
        alike = not np.abs(np.append(positives, negatives)).max() > 1e-12
        if min(len(positives), len(negatives)) < 10 or alike:
            assert gain.p is None and gain == (Gain(0.0, 0.0, 0.0) if alike else Gain(gain.difference))
            continue
        test = stats.ttest_ind(positives, gain.difference - negatives, equal_var=False)
        interval = test.confidence_interval(0.95)
        assert (gain.low, gain.high, gain.p) == pytest.approx((interval.low, interval.high, test.pvalue), abs=1e-10)
    assert len(kinds) == 3


def test_offsets_at_once_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(2)
    domains = rng.geometric(0.02, 3000)
    logits, weights = rng.normal(0, 4, 3000), rng.random(3000) * 3
    labels = (rng.random(3000) < 0.9 - 0.8 * (domains % 2)).astype(np.int64)
    found = domain_offsets(logits, labels, domains, weights, domains.max() + 2)
    for domain, offset in enumerate(found):
        own = domains == domain

        def slope(x: float, own: np.ndarray = own) -> float:
            return float(weights[own] @ (special.expit(logits[own] + x) - labels[own])) + x

        assert offset == pytest.approx(optimize.brentq(slope, -1000, 1000), abs=1e-9)


def test_gains_by_domain_and_their_weighted_mean() -> None:
    rows = make_rows(1200)
    after, before = collected(rows, 0.5), collected(rows)
    gains = paired_gains(after, before)
    one, other = after.compute(), before.compute()
    assert gains.auc.difference == pytest.approx(one.auc - other.auc, abs=1e-12)
    assert gains.wauc.difference == pytest.approx(one.wauc - other.wauc, abs=1e-12)
    assert gains.logloss.difference == pytest.approx(one.logloss - other.logloss, abs=1e-12)
    for name, gain in gains.domains.items():
        assert gain.difference == pytest.approx(one.domains[name].auc - other.domains[name].auc, abs=1e-12)
        assert gain.low < gain.difference < gain.high
    assert gains.wauc.low < gains.wauc.difference < gains.wauc.high
    widths = [gain.high - gain.low for gain in gains.domains.values()]
    assert gains.wauc.high - gains.wauc.low < min(widths)


def test_other_rows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="on the same rows"):
        paired_gains(collected(make_rows(100)), collected(make_rows(100, seed=1)))


def test_rows_that_weigh_unequally_have_differences_alone() -> None:
    logits, labels, domains = make_rows(300)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(0))
    after, before = DomainMetrics(NAMES), DomainMetrics(NAMES)
    after.update(logits + 0.5 * labels, labels, domains, weights)
    before.update(logits, labels, domains, weights)
    gains = paired_gains(after, before)
    assert gains.auc.difference == after.compute().auc - before.compute().auc and gains.auc.low is None


def gains_on_rank(rows: tuple[torch.Tensor, ...]) -> Gains:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = tuple(column[rank * 40 :: 1][: 40 if rank == 0 and world > 1 else None] for column in rows)
    return paired_gains(collected(own, 0.5), collected(own))


def test_ranks_share_their_rows(two_ranks: RankPool) -> None:
    rows = make_rows(300)
    expected = paired_gains(collected(rows, 0.5), collected(rows))
    for found in two_ranks.run(gains_on_rank, rows):
        assert found == expected


def test_offsets_are_those_of_a_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    domains = rng.integers(0, 4, 3000)
    logits = rng.normal(size=3000)
    labels = (rng.random(3000) < 1 / (1 + np.exp(-logits - np.array([0.0, 2.0, -1.0, 0.5])[domains]))).astype(np.int64)
    # the logits as one more column whose weight is held at 1 by a scale that the penalty cannot feel
    columns = np.concatenate([np.eye(4)[domains], logits[:, None] * 1e3], 1)
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10000).fit(columns, labels)
    scale = model.coef_[0, 4] * 1e3
    assert scale == pytest.approx(1.0, abs=0.1)
    found = domain_offsets(logits * scale, labels, domains, np.ones(3000), 5)
    assert found[:4] == pytest.approx(model.coef_[0, :4], abs=1e-3)
    assert found[4] == 0.0  # no rows
    twice = domain_offsets(np.tile(logits, 2), np.tile(labels, 2), np.tile(domains, 2), np.ones(6000), 4)
    assert domain_offsets(logits, labels, domains, np.full(3000, 2.0), 4) == pytest.approx(twice)
