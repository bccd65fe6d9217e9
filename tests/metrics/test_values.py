"""AUC, WAUC, log loss, NE and calibration against scikit-learn, and rows that have none."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from tests.metrics.rows import NAMES, compute, make_rows
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.metrics.domain_metrics import _note_missing


def constant_loss(labels: torch.Tensor) -> float:
    """The log loss of the rows' own share of positives, predicted for each of them."""
    return float(log_loss(labels, np.full(len(labels), float(labels.double().mean()))))


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_equals_scikit_learn(decimals: int) -> None:
    logits, labels, domain_ids = rows = make_rows(1003, decimals=decimals)
    result = compute(rows)
    probability = torch.sigmoid(logits.double())
    assert result.auc == pytest.approx(roc_auc_score(labels, logits), rel=1e-12)
    assert result.logloss == pytest.approx(log_loss(labels, probability), rel=1e-12)
    assert result.rows == 1003
    assert result.ne == pytest.approx(log_loss(labels, probability) / constant_loss(labels), rel=1e-12)
    assert result.calibration == pytest.approx(float(probability.mean() / labels.double().mean()), rel=1e-12)
    weighted = 0.0
    for d, name in enumerate(NAMES):
        mine = domain_ids == d
        expected = roc_auc_score(labels[mine], logits[mine])
        assert result.domains[name].auc == pytest.approx(expected, rel=1e-12)
        assert result.domains[name].logloss == pytest.approx(log_loss(labels[mine], probability[mine]), rel=1e-12)
        assert result.domains[name].rows == int(mine.sum())
        ne = log_loss(labels[mine], probability[mine]) / constant_loss(labels[mine])
        assert result.domains[name].ne == pytest.approx(ne, rel=1e-12)
        calibration = float(probability[mine].mean() / labels[mine].double().mean())
        assert result.domains[name].calibration == pytest.approx(calibration, rel=1e-12)
        weighted += expected * int(mine.sum()) / 1003
    assert result.wauc == pytest.approx(weighted, rel=1e-12)
    assert list(result.domains) == list(NAMES)


def test_ties_count_half() -> None:
    logits, labels = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    expected = np.mean([(p > n) + (p == n) / 2 for p in logits[labels == 1] for n in logits[labels == 0]])
    assert compute((logits, labels, torch.zeros(5, dtype=torch.int64)), ["a"]).auc == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_types_of_logits(dtype: torch.dtype) -> None:
    logits, labels, domain_ids = make_rows(200)
    logits = logits.to(dtype)
    expected = compute((logits.float(), labels, domain_ids))
    assert compute((logits.unsqueeze(1).requires_grad_(), labels.unsqueeze(1), domain_ids)) == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16])
def test_types_of_labels(dtype: torch.dtype) -> None:
    logits, labels, domain_ids = make_rows(200)
    assert compute((logits, labels.to(dtype), domain_ids.int())) == compute((logits, labels, domain_ids))


@pytest.mark.parametrize("value", [float("nan"), 0.3, 0.7, 2.0, -1.0, float("inf")])
def test_labels_that_are_neither_0_nor_1_are_refused_at_once(value: float) -> None:
    logits, labels, domain_ids = make_rows(20)
    metrics = DomainMetrics(NAMES)
    metrics.update(logits, labels, domain_ids)
    labels[7] = value
    with pytest.raises(ValueError, match=rf"row 7 of a batch .* has the label {value:g}$"):
        metrics.update(logits, labels, domain_ids)
    assert metrics.compute().rows == 20


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((8,), (7,), (8,)), "not 8, 7, 8 and 7"),
        (((8,), (8,), (4,)), "not 8, 8, 4 and 8"),
        (((4, 2), (8,), (8,)), r"logits must have the shape \[B\] or \[B, 1\], not \[4, 2\]"),
        (((8,), (), (8,)), r"labels .* not \[\]"),
        (((8,), (8,), (8, 2)), r"domain_ids .* not \[8, 2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    logits, labels, domain_ids = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        DomainMetrics(NAMES).update(logits, labels, domain_ids.long())


def test_domain_ids_that_are_no_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="domain_ids must be integers, not torch.float32"):
        DomainMetrics(NAMES).update(torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_logloss_of_large_logits() -> None:
    rows = torch.tensor([800.0, -800.0, 800.0]), torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64)
    assert compute(rows, ["a"]).logloss == pytest.approx(800 / 3, rel=1e-12)


def test_domains_of_one_class_or_none_have_no_auc(caplog: pytest.LogCaptureFixture) -> None:
    _note_missing.cache_clear()
    logits, labels, domain_ids = make_rows(300)
    labels[domain_ids == 1] = 1.0
    keep = domain_ids != 3
    rows = logits[keep], labels[keep], domain_ids[keep]
    with caplog.at_level(logging.WARNING):
        result = compute(rows)
        compute(rows)
    assert result.domains["b"].auc is None and result.domains["b"].logloss is not None
    assert result.domains["d"].auc is None and result.domains["d"].logloss is None and result.domains["d"].rows == 0
    known = [result.domains["a"], result.domains["c"]]
    weighted = sum(d.rows * (d.auc or 0.0) for d in known) / sum(d.rows for d in known)
    assert result.wauc == pytest.approx(weighted, rel=1e-12)
    assert np.isnan(result.auc_per_domain).tolist() == [False, True, False, True]
    assert result.mean_auc == pytest.approx(np.mean([d.auc for d in known]))
    notes = [record.message for record in caplog.records]
    assert len(notes) == 1 and "b, d" in notes[0]


def test_no_rows_and_one_class() -> None:
    empty = DomainMetrics(["a"]).compute()
    assert (empty.auc, empty.wauc, empty.logloss, empty.rows, empty.mean_auc) == (None, None, None, 0, None)
    ones = compute((torch.randn(5), torch.ones(5), torch.zeros(5, dtype=torch.int64)), ["a"])
    assert (ones.auc, ones.wauc, ones.rows) == (None, None, 5)


def test_to_dict_has_the_keys_of_metrics_json() -> None:
    written = json.loads(json.dumps(compute(make_rows(300)).to_dict(), allow_nan=False))
    assert list(written) == ["auc", "wauc", "logloss", "rows", "ne", "calibration", "domains"]
    assert list(written["domains"]) == list(NAMES)
    assert list(written["domains"]["a"]) == ["auc", "logloss", "rows", "ne", "calibration"]


def test_the_order_of_rows_does_not_matter_bitwise() -> None:
    rows = make_rows(2000)
    expected = compute(rows)
    for seed in range(3):
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
        logits, labels, domain_ids = (column[order] for column in rows)
        assert compute((logits, labels, domain_ids), batch=97) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    logits, labels, domain_ids = make_rows(300)
    logits[7], domain_ids[7] = value, 2
    with pytest.raises(ValueError, match="logits of 1 of 300 .* domain 'c'"):
        compute((logits, labels, domain_ids))


@pytest.mark.parametrize("domain", [-1, 4, 2**31 - 1])
def test_domain_outside_the_division(domain: int) -> None:
    logits, labels, domain_ids = make_rows(300)
    domain_ids[7] = domain
    with pytest.raises(ValueError, match=rf"domain id {domain} is outside .* \[0, 4\)"):
        compute((logits, labels, domain_ids))


def test_a_domain_far_outside_is_not_taken_for_another() -> None:
    logits, labels, domain_ids = make_rows(300)
    domain_ids[7] = 2**32 + 1
    with pytest.raises(ValueError, match=r"is outside .* \[0, 4\)"):
        compute((logits, labels, domain_ids))


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="differ"):
        DomainMetrics(["a", "a"])


def test_rows_of_one_class_have_no_ne_and_without_positives_no_calibration() -> None:
    logits, domains = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0, 0, 1])
    result = compute((logits, torch.tensor([0.0, 0.0, 1.0]), domains), ["zeros", "ones", "none"])
    zeros, ones, none = result.domains.values()
    assert (zeros.ne, zeros.calibration, ones.ne, none.ne, none.calibration) == (None, None, None, None, None)
    assert ones.calibration == pytest.approx(1 / (1 + np.exp(-2.0))) and zeros.logloss is not None
