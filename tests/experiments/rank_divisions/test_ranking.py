"""Scores of divisions on data whose information is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.experiments.rank_divisions.made import by_name, draw, user_data, write
from torchrec_mdr.data.schema import Division, Schema, domain_column
from torchrec_mdr.experiments.rank_divisions import ranking
from torchrec_mdr.experiments.rank_divisions.effects import Cells
from torchrec_mdr.experiments.rank_divisions.ranking import rank_divisions
from torchrec_mdr.prepare import prepare


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
