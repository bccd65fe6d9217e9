"""Calibration changes no order, and the log loss for the better or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from tests.inference.runs import finished
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.inference import Scorer, export
from torchrec_mdr.inference.calibration import PRIOR_ROWS, fit_calibration
from torchrec_mdr.inference.run_data import data_of


def rows(sizes: list[int], truths: list[tuple[float, float]], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels drawn by scale and bias of each domain, and domains."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    logits = torch.randn(len(ids), generator=generator)
    scale, bias = torch.tensor(truths)[ids].T
    labels = torch.rand(len(ids), generator=generator) < torch.sigmoid(scale * logits + bias)
    return logits, labels.float(), ids


def test_one_large_domain_is_platt_scaling() -> None:
    logits, labels, ids = rows([20000], [(1.7, -0.4)])
    fitted = fit_calibration(logits, labels, ids, 1)[0]
    plain = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        logits.double().numpy()[:, None], labels.double().numpy()
    )
    assert fitted.tolist() == pytest.approx([plain.coef_[0, 0], plain.intercept_[0]], abs=1e-4)


def test_a_small_domain_is_drawn_towards_all_rows() -> None:
    logits, labels, ids = rows([20000, 300], [(1.5, 0.0), (0.5, 1.0)])
    fitted = fit_calibration(logits, labels, ids, 2)
    x, y = logits.double().numpy(), labels.numpy()

    def loss(theta: np.ndarray, own: np.ndarray) -> float:
        z = np.exp(theta[0]) * x[own] + theta[1]
        return float((np.logaddexp(0, z) - y[own] * z).sum())

    everyone = np.full(len(x), True)
    common = minimize(loss, [0.0, 0.0], (everyone,), tol=1e-10).x
    step = 1e-4
    basis = step * np.eye(2)
    curvature = np.array(
        [
            [
                (loss(common + a + b, everyone) - loss(common + a, everyone) - loss(common + b, everyone))
                + loss(common, everyone)
                for a in basis
            ]
            for b in basis
        ]
    ) / (step**2 * len(x))

    def pulled(theta: np.ndarray) -> float:
        away = theta - common
        return loss(theta, ids.numpy() == 1) + 0.5 * PRIOR_ROWS * float(away @ curvature @ away)

    wanted = minimize(pulled, common, tol=1e-10).x
    assert fitted[1].tolist() == pytest.approx([np.exp(wanted[0]), wanted[1]], abs=2e-2)
    own_fit = minimize(loss, [0.0, 0.0], (ids.numpy() == 1,), tol=1e-10).x
    assert own_fit[1] > wanted[1] > common[1]


@pytest.mark.parametrize("seed", range(3))
def test_no_domain_loses(seed: int) -> None:
    sizes = [20000, 300, 40, 3, 0]
    logits, labels, ids = rows(sizes, [(0.3, 1.0), (1.0, 0.0), (1.0, -1.0), (2.0, 0.0), (1.0, 0.0)], seed)
    fitted = fit_calibration(logits, labels, ids, 5)
    assert (fitted[:, 0] > 0).all() and fitted[4].tolist() == [1.0, 0.0]
    kept = 0
    for domain in range(4):
        own = ids == domain
        before, after = logits[own].double(), logits[own].double() * fitted[domain, 0] + fitted[domain, 1]
        y = labels[own].numpy()
        losses = [log_loss(y, torch.sigmoid(one).numpy(), labels=[0, 1]) for one in (before, after)]
        assert losses[1] <= losses[0]
        kept += fitted[domain].tolist() == [1.0, 0.0]
        if len(set(y)) == 2:
            assert roc_auc_score(y, before.numpy()) == roc_auc_score(y, after.numpy())
    assert kept < 4
    assert fit_calibration(logits[ids == 0], labels[ids == 0], ids[ids == 0], 1)[0, 0] < 0.5


def test_a_bundle_calibrates_its_probabilities_and_not_its_logits(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "mlora", "--backbone=dlrm")  # whose labels want a scale of two
    for name, calibrate in (("plain", False), ("calibrated", True)):
        export(run, str(tmp_path / name), calibrate=calibrate, compiled=False)
    plain, calibrated = (Scorer(str(tmp_path / name), False) for name in ("plain", "calibrated"))
    loader = data_of(run).eval_loader("validation", Environment(0, 1, torch.device("cpu")))
    batch = next(iter(loader.batches(0)))
    one, other = (
        own.score(batch.dense_features, batch.sparse_features, batch.domains.ids) for own in (plain, calibrated)
    )
    assert torch.equal(one.logits, other.logits)
    for domain in range(3):
        own = (batch.domains.ids[:, 0] == domain).numpy()
        y = batch.labels.numpy()[own]
        before, after = one.probabilities.numpy()[own], other.probabilities.numpy()[own]
        assert log_loss(y, after) < log_loss(y, before)
        assert roc_auc_score(y, after) == roc_auc_score(y, before)
    nobody = torch.full_like(batch.domains.ids, -1)
    one, other = (own.score(batch.dense_features, batch.sparse_features, nobody) for own in (plain, calibrated))
    assert torch.equal(one.probabilities, other.probabilities)
