from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from tests.ranks import RankPool
from torchrec_mdr.metrics import DomainMetrics, Metrics, _note_missing

NAMES = ["a", "b", "c", "d"]
Rows = tuple[Tensor, Tensor, Tensor]


def make_rows(num_rows: int, seed: int = 0, decimals: int = 1, num_domains: int = 4) -> Rows:
    """Logits with many ties, labels that depend on them, domains of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, generator=generator) * 2).round(decimals=decimals)
    labels = (torch.rand(num_rows, generator=generator) < torch.sigmoid(logits / 2)).float()
    domain_ids = (torch.rand(num_rows, generator=generator) ** 2 * num_domains).long()
    return logits, labels, domain_ids


def compute(rows: Rows, names: list[str] = NAMES, batch: int = 64) -> Metrics:
    metrics = DomainMetrics(names)
    for start in range(0, len(rows[0]), batch):
        metrics.update(*(column[start : start + batch] for column in rows))
    return metrics.compute()


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_equals_scikit_learn(decimals: int) -> None:
    logits, labels, domain_ids = rows = make_rows(1003, decimals=decimals)
    result = compute(rows)
    probability = torch.sigmoid(logits.double())
    assert result.auc == pytest.approx(roc_auc_score(labels, logits), rel=1e-12)
    assert result.logloss == pytest.approx(log_loss(labels, probability), rel=1e-12)
    assert result.rows == 1003
    weighted = 0.0
    for d, name in enumerate(NAMES):
        mine = domain_ids == d
        expected = roc_auc_score(labels[mine], logits[mine])
        assert result.domains[name].auc == pytest.approx(expected, rel=1e-12)
        assert result.domains[name].logloss == pytest.approx(log_loss(labels[mine], probability[mine]), rel=1e-12)
        assert result.domains[name].rows == int(mine.sum())
        weighted += expected * int(mine.sum()) / 1003
    assert result.wauc == pytest.approx(weighted, rel=1e-12)
    assert list(result.domains) == NAMES


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
    assert list(written) == ["auc", "wauc", "logloss", "rows", "domains"]
    assert list(written["domains"]) == NAMES
    assert list(written["domains"]["a"]) == ["auc", "logloss", "rows"]


def test_the_order_of_rows_does_not_matter_bitwise() -> None:
    rows = make_rows(2000)
    expected = compute(rows)
    for seed in range(3):
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))
        logits, labels, domain_ids = (column[order] for column in rows)
        assert compute((logits, labels, domain_ids), batch=97) == expected


def test_reset_forgets() -> None:
    metrics = DomainMetrics(NAMES)
    metrics.update(*make_rows(100, seed=1))
    metrics.reset()
    metrics.update(*make_rows(300))
    assert metrics.compute() == compute(make_rows(300))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    logits, labels, domain_ids = make_rows(300)
    logits[7], domain_ids[7] = value, 2
    with pytest.raises(ValueError, match="logits of 1 of 300 .* domain 'c'"):
        compute((logits, labels, domain_ids))


@pytest.mark.parametrize("domain", [-1, 4])
def test_domain_outside_the_division(domain: int) -> None:
    logits, labels, domain_ids = make_rows(300)
    domain_ids[7] = domain
    with pytest.raises(ValueError, match=rf"domain id {domain} is outside .* \[0, 4\)"):
        compute((logits, labels, domain_ids))


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="differ"):
        DomainMetrics(["a", "a"])


def compute_share(rows: Rows, share: list[int]) -> Metrics:
    start = sum(share[: dist.get_rank()])
    logits, labels, domain_ids = (column[start : start + share[dist.get_rank()]] for column in rows)
    return compute((logits, labels, domain_ids))


@pytest.mark.parametrize("share", [[150, 150], [290, 10], [0, 300], [300, 0]])
def test_two_ranks_equal_one_bitwise(two_ranks: RankPool, share: list[int]) -> None:
    rows = make_rows(300)
    expected = compute(rows)
    assert two_ranks.run(compute_share, rows, share) == [expected, expected]


def test_two_ranks_without_rows(two_ranks: RankPool) -> None:
    empty = DomainMetrics(NAMES).compute()
    assert two_ranks.run(compute_share, make_rows(0), [0, 0]) == [empty, empty]


def error_on_this_rank(rows: Rows, share: list[int]) -> str:
    with pytest.raises(ValueError) as error:
        compute_share(rows, share)
    return str(error.value)


def test_two_ranks_raise_the_same_error(two_ranks: RankPool) -> None:
    logits, labels, domain_ids = make_rows(300)
    logits[299] = float("nan")
    first, second = two_ranks.run(error_on_this_rank, (logits, labels, domain_ids), [200, 100])
    assert first == second and "1 of 300" in first
