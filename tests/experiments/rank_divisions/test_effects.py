"""Effects of features on a logit, and contrasts of them, against other ways to compute them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tests.experiments.rank_divisions.made import draw
from torchrec_mdr.experiments.rank_divisions.effects import AdditiveLogit, Cells, Contrast, Feature, log_loss, slopes


@pytest.mark.parametrize("bound", [40, 10**12])
def test_cells_number_what_occurs(bound: int) -> None:
    values = np.random.default_rng(0).choice(np.array([3, 5, 20, 39]), 50)
    cells = Cells.of(values, bound)
    assert cells.size == 4
    assert [values[cells.ids == i].tolist() == [v] * int((values == v).sum()) for i, v in enumerate((3, 5, 20, 39))]
    pairs = cells.cross(Cells.of(np.arange(50) % 2, 2))
    assert pairs.size == len(set(zip(values.tolist(), (np.arange(50) % 2).tolist(), strict=True)))
    assert (pairs.within(cells)[pairs.ids] == cells.ids).all()


def test_additive_effects_are_shrunken_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    items, users = rng.integers(0, 200, 4000), rng.integers(0, 5, 4000)
    truth = rng.normal(0, 0.7, 200)[items] + rng.normal(0, 0.5, 5)[users] - 0.5
    labels = draw(rng, truth)
    terms = [(Feature("u", Cells(users, 5)), Cells(users, 5)), (Feature("i", Cells(items, 200)), Cells(items, 200))]
    fitted = AdditiveLogit(labels, terms)
    for _ in range(20):
        fitted.fit()
    logits = fitted.logits

    from sklearn.linear_model import LogisticRegression

    def one_hot(ids: Any, size: int) -> Any:
        return np.eye(size)[ids]

    def reference(strength: float) -> Any:
        x = np.hstack([10 * one_hot(users, 5), one_hot(items, 200)])  # users are all but unshrunken
        return LogisticRegression(C=strength, solver="newton-cholesky").fit(x, labels).decision_function(x)

    # the right strength is the effects' variance
    wanted = reference(0.7**2)
    assert np.corrcoef(logits, wanted)[0, 1] > 0.995
    assert np.abs(logits - wanted).max() < 0.25
    errors = [((z - truth) ** 2).mean() for z in (logits, reference(100.0))]
    assert errors[0] < 0.8 * errors[1]


def test_what_noise_explains_has_no_effect() -> None:
    items = np.repeat(np.arange(50), 8)
    labels = np.tile(np.array([0.0, 1.0, 0.0, 0.0]), 100)
    cells = Cells(items, 50)
    fitted = AdditiveLogit(labels, [(Feature("i", cells), cells)])
    fitted.fit()
    assert (fitted.effects[0] == 0).all() and np.ptp(fitted.logits) == 0


def contrast_by_loops(
    entries: list[tuple[int, int, float]], d: Any, a: Any, fold: Any, g: Any, h: Any, held_out: int
) -> list[float]:
    """The change that `Contrast` should give; entries are row, id, share."""
    g_cell: dict[Any, Any] = defaultdict(lambda: defaultdict(float))
    h_cell: dict[Any, Any] = defaultdict(lambda: defaultdict(float))
    for row, f, share in entries:
        if fold[row] != held_out:
            g_cell[d[row], a[row], f][fold[row]] += share * g[row]
            h_cell[d[row], a[row], f][fold[row]] += share * h[row]
    total: dict[Any, float] = defaultdict(float)
    for effect_of in (lambda cell: cell[1:], lambda cell: cell):
        g_parent: dict[Any, float] = defaultdict(float)
        h_parent: dict[Any, float] = defaultdict(float)
        for cell in h_cell:
            g_parent[cell[0], cell[2]] += sum(g_cell[cell].values())
            h_parent[cell[0], cell[2]] += sum(h_cell[cell].values())
        e: dict[Any, Any] = defaultdict(lambda: defaultdict(float))
        c: dict[Any, Any] = defaultdict(lambda: defaultdict(float))
        i: dict[Any, float] = defaultdict(float)
        for cell in h_cell:
            parent, effect, mine = (cell[0], cell[2]), effect_of(cell), sum(h_cell[cell].values())
            i[effect] += mine * (1 - mine / h_parent[parent])
            for j in h_cell[cell]:
                e[effect][j] += g_cell[cell][j] - h_cell[cell][j] * g_parent[parent] / h_parent[parent]
                c[effect][j] += h_cell[cell][j]
        big_e = {k: sum(v.values()) for k, v in e.items()}
        big_c = {k: sum(v.values()) for k, v in c.items()}
        spread = sum((e[k][j] - c[k][j] * big_e[k] / big_c[k]) ** 2 for k in e for j in e[k])
        phi = spread / sum(big_c[k] - sum(v**2 for v in c[k].values()) / big_c[k] for k in e)
        excess = sum(v**2 for v in big_e.values()) - phi * sum(i.values())
        if excess <= 0:
            continue
        variance = excess / sum(big_c[k] * i[k] for k in e)
        effects = {cell: big_e[effect_of(cell)] / (big_c[effect_of(cell)] + phi / variance) for cell in h_cell}
        for cell in h_cell:
            siblings = [other for other in h_cell if other[0] == cell[0] and other[2] == cell[2]]
            mean = sum(effects[s] * sum(h_cell[s].values()) for s in siblings) / h_parent[cell[0], cell[2]]
            step = effects[cell] - mean
            total[cell] += step
            for j in h_cell[cell]:
                g_cell[cell][j] -= h_cell[cell][j] * step
    change = [0.0] * len(g)
    for row, f, share in entries:
        change[row] += share * total[d[row], a[row], f]
    return change


@pytest.mark.parametrize("several", [False, True])
def test_a_contrast_agrees_with_loops_over_rows(several: bool) -> None:
    rng = np.random.default_rng(1)
    n = 1500
    d, a, fold = rng.integers(0, 2, n), rng.integers(0, 3, n), rng.integers(0, 4, n)
    lengths = rng.integers(0, 4, n) if several else np.ones(n, dtype=np.int64)
    rows = np.repeat(np.arange(n), lengths)
    ids = rng.integers(0, 6, len(rows))
    shares = 1 / lengths[rows]
    taste, own = rng.normal(0, 0.7, (3, 6)), rng.normal(0, 0.5, (2, 3, 6))
    logits = np.bincount(rows, shares * (taste[a[rows], ids] + own[d[rows], a[rows], ids]), n)
    slope = slopes(draw(rng, logits), np.full(n, 0.1))
    cells = Cells(ids, 6)
    feature = Feature("f", cells, rows, shares) if several else Feature("f", cells)
    contrast = Contrast.of(feature, Cells(d, 2), Cells(a, 3), Cells(fold, 4))
    assert contrast is not None and len(contrast.levels) == 2
    change = contrast.change(slope, 2)
    entries = list(zip(rows.tolist(), ids.tolist(), shares.tolist(), strict=True))
    wanted = contrast_by_loops(entries, d, a, fold, *slope, 2)
    assert change is not None and np.abs(change).max() > 0.3
    np.testing.assert_allclose(change, wanted, atol=1e-12)


def test_a_contrast_does_not_see_the_held_out_fold() -> None:
    rng = np.random.default_rng(2)
    n = 900
    d, a, f, fold = (rng.integers(0, size, n) for size in (2, 2, 5, 3))
    labels = draw(rng, 2.0 * ((a + f) % 2) - 1)
    contrast = Contrast.of(Feature("f", Cells(f, 5)), Cells(d, 2), Cells(a, 2), Cells(fold, 3))
    assert contrast is not None
    flipped = np.where(fold == 1, 1 - labels, labels)
    first, second = (contrast.change(slopes(y, np.zeros(n)), 1) for y in (labels, flipped))
    assert first is not None and second is not None and (first == second).all()


def test_log_loss_is_that_of_the_labels() -> None:
    z = np.array([-3.0, 0.2, 30.0])
    p = 1 / (1 + np.exp(-z))
    for label in (0.0, 1.0):
        wanted = -(label * np.log(p) + (1 - label) * np.log1p(-p))
        np.testing.assert_allclose(log_loss(np.full(3, label), z), wanted, rtol=1e-2)
