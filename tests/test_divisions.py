"""The ranking of auxiliary divisions, against loops, known answers and divisions that mean nothing."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from torchrec_mdr.data.prepare import prepare
from torchrec_mdr.data.schema import Division, Schema, SparseFeature, domain_column
from torchrec_mdr.data.table import write_split
from torchrec_mdr.divisions import DivisionScore, __main__, ranking
from torchrec_mdr.divisions.__main__ import main
from torchrec_mdr.divisions.effects import AdditiveLogit, Cells, Contrast, Feature, log_loss, slopes
from torchrec_mdr.divisions.ranking import rank_divisions


def write(folder: Path, labels: Any, sparse: dict[str, Any], divisions: dict[str, Any], **dense: Any) -> str:
    """A prepared training split; there are no other splits to look at."""
    folder.mkdir()
    sizes = {
        name: int(np.max(pa.array(ids).flatten() if isinstance(ids, pa.Array) else ids)) + 1
        for name, ids in sparse.items()
    }
    table = {"label": np.asarray(labels, dtype=np.float32), **sparse, **dense}
    table.update({domain_column(name): ids for name, ids in divisions.items()})
    rows = write_split(str(folder), "train", [table])
    Schema(
        dataset="made",
        label="label",
        sparse_features=tuple(
            SparseFeature(name, size, isinstance(sparse[name], pa.Array)) for name, size in sizes.items()
        ),
        dense_features=tuple(dense),
        divisions=tuple(Division(name, int(ids.max()) + 1) for name, ids in divisions.items()),
        rows={"train": rows, "validation": 0, "test": 0},
    ).save(str(folder))
    return str(folder)


def draw(rng: np.random.Generator, logits: Any) -> Any:
    return (rng.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def by_name(scores: list[DivisionScore]) -> dict[str, DivisionScore]:
    return {score.division: score for score in scores}


# --- effects


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


# --- scores


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_the_score_is_the_information_that_was_put_in(tmp_path: Path, strength: float) -> None:
    rng = np.random.default_rng(3)
    n = 60_000
    natural, auxiliary, item = rng.integers(0, 2, n), rng.integers(0, 2, n), rng.integers(0, 10, n)
    # nothing but the pair of auxiliary domain and item tells about the label, and only in natural domain 1
    labels = draw(rng, strength * natural * (2 * ((auxiliary + item) % 2) - 1))
    folder = write(tmp_path / "d", labels, {"item": item}, {"natural": natural, "auxiliary": auxiliary})
    score = rank_divisions(folder)[0]
    p = 1 / (1 + np.exp(-strength))
    information = np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p)
    assert score.score == pytest.approx(information / 2, abs=3 * score.standard_error)
    assert score.score > 10 * score.standard_error
    zero, one = score.domains["0"], score.domains["1"]
    assert zero.score is not None and one.score is not None
    assert one.score == pytest.approx(information, rel=0.15)
    assert abs(zero.score) < 0.05 * information
    assert zero.rows + one.rows == n
    assert score.held_out_by is None
    assert score.features == {"item": pytest.approx(score.score)}


def test_divisions_that_mean_nothing_come_last(tmp_path: Path) -> None:
    source = prepare("synthetic", cache_dir=str(tmp_path / "cache"), rows=40_000, num_domains=4)
    schema = Schema.load(source)
    import polars as pl

    table = pl.read_parquet(f"{source}/train.parquet")
    scenario = table[domain_column("scenario")].to_numpy()
    extra = {
        "random": np.random.default_rng(0).integers(0, 4, len(table)),
        "copy": scenario,
        "coarser": scenario // 2,
        "one": np.zeros(len(table), dtype=np.int64),
    }
    table = table.with_columns(pl.Series(domain_column(name), ids, dtype=pl.Int32) for name, ids in extra.items())
    folder = tmp_path / "with_extra"
    folder.mkdir()
    table.write_parquet(folder / "train.parquet")
    divisions = (*schema.divisions, *(Division(name, int(ids.max()) + 1) for name, ids in extra.items()))
    Schema(schema.dataset, schema.label, schema.sparse_features, schema.dense_features, divisions, schema.rows).save(
        str(folder)
    )

    scores = rank_divisions(str(folder), "scenario")
    found = by_name(scores)
    assert scores[0].division == "segment"
    assert found["segment"].score > 20 * found["segment"].standard_error
    # learning from noise costs about a nat for each feature
    assert -20 / len(table) < found["random"].score < 2 * found["random"].standard_error
    assert [found[name].score for name in ("copy", "coarser", "one")] == [0.0, 0.0, 0.0]
    assert found["copy"].features == {}
    assert [score.division for score in rank_divisions(str(folder), "scenario", ["one", "segment"])] == [
        "segment",
        "one",
    ]


def user_data(folder: Path) -> str:
    """Users with strong tastes of their own, of which a little goes by gender."""
    rng = np.random.default_rng(4)
    n, users, genres = 60_000, 600, 8
    user, genre = rng.integers(0, users, n), rng.integers(0, genres, n)
    gender, age, cut = rng.integers(0, 2, users), rng.integers(0, 2, users), rng.integers(0, 20, users)
    taste = rng.normal(0, 1, (users, genres)) + 0.4 * (2 * gender[:, None] - 1) * (-1) ** np.arange(genres)
    labels = draw(rng, taste[user, genre] + rng.normal(0, 1, users)[user])
    divisions = {"age": age, "gender": gender, "cut": cut}
    sparse = {"user": user, "genre": genre, "age": age[user]}
    return write(folder, labels, sparse, {name: ids[user] for name, ids in divisions.items()})


def test_single_users_tastes_are_no_difference_between_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = user_data(tmp_path / "d")
    found = by_name(rank_divisions(folder))
    assert found["gender"].held_out_by == found["cut"].held_out_by == "user"
    assert found["gender"].score > 5 * found["gender"].standard_error
    assert found["cut"].score < 2 * found["cut"].standard_error
    assert found["cut"].score > -0.05 * found["gender"].score
    assert set(found["gender"].features) == {"genre"}
    # the same data do deceive where rows are dealt singly
    monkeypatch.setattr(ranking, "MIN_DETERMINED", 2.0)
    naive = by_name(rank_divisions(folder))
    assert naive["cut"].held_out_by is None
    assert naive["cut"].score > 5 * naive["cut"].standard_error


def test_domains_that_differ_in_rate_alone_do_not_differ_in_preferences(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    n = 40_000
    natural, position, item = rng.integers(0, 2, n), rng.integers(0, 3, n), rng.integers(0, 50, n)
    labels = draw(rng, rng.normal(0, 1, 50)[item] + np.array([-4.0, -1.0, 2.0])[position] + 0.5 * natural)
    folder = write(tmp_path / "d", labels, {"item": item}, {"natural": natural, "position": position})
    score = rank_divisions(folder)[0]
    assert abs(score.score) < max(3 * score.standard_error, 2e-5)


def test_features_of_several_ids_and_dense_ones_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    n = 20_000
    natural, auxiliary, item = rng.integers(0, 2, n), rng.integers(0, 3, n), rng.integers(0, 30, n)
    price = rng.normal(size=n).astype(np.float32)
    labels = draw(rng, rng.normal(0, 1, (3, 30))[auxiliary, item] + (auxiliary - 1) * price)
    divisions = {"natural": natural, "auxiliary": auxiliary}
    bags = pa.array([[int(i)] for i in item], pa.list_(pa.int32()))
    single = rank_divisions(write(tmp_path / "s", labels, {"item": item}, divisions, price=price))[0]
    listed = rank_divisions(write(tmp_path / "l", labels, {"item": bags}, divisions, price=price))[0]
    assert listed.score == pytest.approx(single.score, rel=1e-9)
    assert single.features["price"] > 0.02 and single.features["item"] > 0.02
    # with no id at all in most rows there is less to go by
    bags = pa.array([[i] if i % 3 == 0 else [] for i in item.tolist()], pa.list_(pa.int32()))
    sparse = rank_divisions(write(tmp_path / "e", labels, {"item": bags}, divisions, price=price))[0]
    assert 0.01 < sparse.features["item"] < 0.5 * single.features["item"]


def test_standard_errors_take_rows_of_a_unit_together() -> None:
    gains = np.random.default_rng(0).normal(1, 1, 500)
    whole = np.ones(2000, dtype=np.bool_)
    single = ranking._mean(gains, Cells(np.arange(500), 500), whole[:500])
    again = ranking._mean(np.repeat(gains, 4), Cells(np.repeat(np.arange(500), 4), 500), whole)
    assert single.standard_error == pytest.approx(gains.std() / 500**0.5)
    assert (again.score, again.standard_error) == pytest.approx((single.score, single.standard_error))


def test_a_large_split_is_sampled(tmp_path: Path) -> None:
    folder = user_data(tmp_path / "d")
    score = rank_divisions(folder, "age", ["gender"], max_rows=20_000)[0]
    rows = sum(domain.rows for domain in score.domains.values())
    assert abs(rows - 20_000) < 600
    assert score.score > 0


def test_a_natural_domain_without_rows_has_no_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    natural = rng.choice(np.array([0, 2]), 200)
    columns = {"natural": natural, "auxiliary": rng.integers(0, 2, 200)}
    folder = write(tmp_path / "d", rng.integers(0, 2, 200), {"item": rng.integers(0, 3, 200)}, columns)
    empty = rank_divisions(folder)[0].domains["1"]
    assert (empty.score, empty.standard_error, empty.rows) == (None, None, 0)


def test_gender_leads_on_movielens(tmp_path: Path, movielens_100k: Path) -> None:
    folder = prepare("movielens-100k", data_dir=str(movielens_100k), cache_dir=str(tmp_path), division="age3")
    scores = rank_divisions(folder, "age3", ["activity", "age", "gender", "occupation"])
    assert scores[0].division == "gender"
    assert {score.held_out_by for score in scores} == {"user"}


# --- the command


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = user_data(tmp_path / "d")
    output = tmp_path / "ranking.json"
    assert main(["--dataset", folder, "--candidates", "cut, gender", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["gender", "cut"]
    assert "domains of 'age'" in " ".join(lines)
    written = json.loads(output.read_text())
    assert (written["natural"], written["unit"]) == ("age", "nats per row")
    assert [entry["division"] for entry in written["ranking"]] == ["gender", "cut"]
    assert set(written["ranking"][0]["domains"]) == {"0", "1"}
    assert f"{1e4 * written['ranking'][0]['score']:+.2f}" in lines[2]
    assert sorted(os.listdir(tmp_path)) == ["d", "ranking.json"]


def test_a_data_set_by_name_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = user_data(tmp_path / "d")
    asked = []
    monkeypatch.setattr(__main__, "prepare", lambda name, **options: asked.append((name, options)) or folder)
    arguments = ["--dataset", "movielens-1m", "--data_dir", "x", "--protocol", "mlora", "--division", "gender"]
    assert main([*arguments, "--candidates", "age"]) == 0
    assert asked == [("movielens-1m", {"data_dir": "x", "division": "gender", "protocol": "mlora"})]
    assert "domains of 'gender'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dataset", "{d}", "--division", "sex"], "has no division 'sex'; it has age, gender, cut"),
        (["--dataset", "{d}", "--candidates", "sex"], "has no division 'sex'"),
        (["--dataset", "{d}", "--candidates", "gender,age"], "candidate 'age' is the natural division itself"),
        (["--dataset", "{d}", "--candidates", ","], "no candidate is named"),
        (["--dataset", "{d}", "--data_dir", "x"], "leave out --data_dir and --protocol"),
        (["--dataset", "{d}", "--max_rows", "3"], "max_rows must be at least 5"),
        (["--dataset", "{d}", "--output", "{d}/none/r.json"], "does not exist; create it"),
        (["--dataset", "{d}/.."], "is no prepared data set"),
        (["--dataset", "nothing"], "there is no data set or folder 'nothing'"),
        (["--dataset", "movielens-1m"], "name their folder with --data_dir"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    rng = np.random.default_rng(8)
    columns = {name: rng.integers(0, 2, 60) for name in ("age", "gender", "cut")}
    folder = write(tmp_path / "d", rng.integers(0, 2, 60), {"item": rng.integers(0, 3, 60)}, columns)
    assert main([argument.replace("{d}", folder) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert complaint in printed.err


def test_too_few_rows_or_divisions_are_told(tmp_path: Path) -> None:
    two = np.array([0, 1])
    few = write(tmp_path / "few", two, {"item": two}, {"natural": two, "other": two})
    with pytest.raises(ValueError, match="has 2 training rows, too few for 5 folds"):
        rank_divisions(few)
    alone = write(tmp_path / "alone", two, {"item": two}, {"natural": two})
    with pytest.raises(ValueError, match="no division besides 'natural'"):
        rank_divisions(alone)


def test_the_help_says_how_it_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "The score is what these effects save in log loss" in capsys.readouterr().out


def test_log_loss_is_that_of_the_labels() -> None:
    z = np.array([-3.0, 0.2, 30.0])
    p = 1 / (1 + np.exp(-z))
    for label in (0.0, 1.0):
        wanted = -(label * np.log(p) + (1 - label) * np.log1p(-p))
        np.testing.assert_allclose(log_loss(np.full(3, label), z), wanted, rtol=1e-2)
