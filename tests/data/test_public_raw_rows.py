"""Raw rows of public data sets become, by their features.yaml, what was prepared of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.data.public_forms import (
    criteo_line,
    made,
    write_ali_ccp,
    write_amazon_2014,
    write_douban,
    write_kuairand,
    write_lines,
    write_taobao,
)
from tests.data.test_movielens import USERS_1M, write_1m
from torchrec_mdr.data.datasets import staged_rows
from torchrec_mdr.data.datasets.raw_rows import RawRows
from torchrec_mdr.data.datasets.staged_rows import StagedRows
from torchrec_mdr.data.features import FeaturePlan
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.evaluate import evaluate
from torchrec_mdr.prepare import prepare
from torchrec_mdr.train import train

Rows = list[dict[str, Any]]


def amazon_2014(folder: Path) -> Rows:
    fields = ("reviewerID", "asin", "overall", "unixReviewTime")
    every = [{**{name: row[name] for name in fields}, "category": stem} for stem, row in write_amazon_2014(folder)]
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in every)]


def ali_ccp(folder: Path) -> Rows:
    every = [row for rows in write_ali_ccp(folder).values() for row in rows if row[0] or not row[1]]
    names = {name for row in every for name in row[2]}
    return [
        {"click": row[0], **dict.fromkeys(names), **row[2], **{f"D{name}": n for name, n in row[3].items()}}
        for row in every
    ]


def kuairand(folder: Path) -> Rows:
    shown, users = write_kuairand(folder)
    video = {"video_type": "NORMAL", "visible_status": 1, "server_width": "720.0", "server_height": "1280.0"}
    kept = [row for row in shown if row["tab"] != 9 and row["user_id"] != 40]
    return [{**row, **users[str(row["user_id"])], **video} for row in kept]


def criteo(folder: Path) -> Rows:
    rng = random.Random(6)
    lines = [criteo_line(rng) for _ in range(700)]
    write_lines(folder / "train.txt", map("\t".join, lines))
    names = ["click", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    return [dict(zip(names, line, strict=True)) for line in lines]


def douban(folder: Path) -> Rows:
    every = write_douban(folder)
    people = {
        str(i): {"place": ("北京", "")[i % 2], "joined": f"2008-0{1 + i % 3}"} if i < 14 else {} for i in range(15)
    }
    empty = {"place": None, "joined": None}
    return [
        {"kind": kind, "user": user, "item": f"{kind} {item}", "rating": rating or "0", **empty, **people[user]}
        for kind, user, item, rating in every
    ]


def taobao(folder: Path) -> Rows:
    clicks = write_taobao(folder)
    themes = list(dict.fromkeys(theme for *_, theme in clicks))[:3]
    kept = dict.fromkeys(click for click in clicks if click[2] in themes and click[0] != "19")
    vectors = [
        {f"{name}_{k}": int(value) + k / 128 for name, value in (("user", user), ("item", item)) for k in range(128)}
        for user, item, _ in kept
    ]
    return [{"theme": click[2], "label": 1, **vector} for click, vector in zip(kept, vectors, strict=True)]


def movielens(folder: Path) -> Rows:
    write_1m(folder)
    names = ("user", "gender", "age", "occupation", "zip")
    users = {line.split("::")[0]: dict(zip(names, line.split("::"), strict=True)) for line in USERS_1M}
    genres = {"3": "Drama", "10": "Action"}
    ratings = [line.split("::") for line in (folder / "ratings.dat").read_text().splitlines()]
    return [
        {**users[user], "movie": movie, "genre": genres[movie], "rating": rating} for user, movie, rating, _ in ratings
    ]


@pytest.mark.parametrize(
    ("dataset", "write", "options"),
    [
        ("amazon-2014", amazon_2014, {}),
        ("ali-ccp", ali_ccp, {}),
        ("kuairand-pure", kuairand, {}),
        ("douban", douban, {}),
        ("criteo", criteo, {"min_count": 5, "min_rows": 130}),
        ("taobao-themes", taobao, {"themes": 3}),
        ("movielens-1m", movielens, {}),
        ("movielens-1m", movielens, {"protocol": "mlora", "division": "age"}),
    ],
)
def test_raw_rows_become_the_prepared_ones(
    tmp_path: Path, dataset: str, write: Callable[[Path], Rows], options: dict[str, Any]
) -> None:
    rows = pl.DataFrame(write(tmp_path / "raw"), infer_schema_length=None)
    schema, frames = made(tmp_path, dataset, tmp_path / "raw", **options)
    encoded = FeaturePlan.load(str(tmp_path / "made")).encode(rows, need_label=True)
    assert encoded.errors.null_count() == len(rows) > 0
    prepared = pl.concat(frames.values())
    if dataset == "taobao-themes":
        prepared = prepared.filter(pl.col("label") == 1)  # the others are drawn
    columns = prepared.columns
    assert encoded.columns.select(columns).sort(columns).equals(prepared.sort(columns))
    assert len(columns) == 1 + len(schema.sparse_features) + len(schema.dense_features) + len(schema.divisions)


def test_rows_of_what_no_training_row_had(tmp_path: Path) -> None:
    known = {"user": ["u", "u", "v"], "shop": ["Oslo", "Rome", "Rome"], "label": [0, 1, 1]}
    frame = pl.DataFrame(known).lazy()
    RawRows(dict.fromkeys(("train", "validation", "test"), frame), sparse=("user",), divisions=("shop",)).write(
        str(tmp_path), "x"
    )
    new = pl.DataFrame({"user": ["u", "v", "w", None], "shop": ["Rome", "Oslo", "Kiev", None]})
    encoded = FeaturePlan.load(str(tmp_path)).encode(new)
    assert encoded.columns.rows() == [(1, 1, 1), (0, 0, 0), (0, 2, -1), (0, 2, -1)]
    assert encoded.unknown["shop"].to_list() == [False, False, True, True] and encoded.errors.null_count() == 4
    # MovieLens has no id for what is unknown
    rows = pl.DataFrame(movielens(tmp_path / "raw"))
    made(tmp_path, "movielens-1m", tmp_path / "raw")
    strange = rows.with_columns(movie=pl.lit("77")).head(1)
    (reason,) = FeaturePlan.load(str(tmp_path / "made")).encode(strange).errors
    assert reason.startswith("column 'movie': '77' is unknown, and the features that were trained have no id for")


def test_values_are_counted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    values = [rng.choice((None, f"v{int(200 * rng.random() ** 3)}")) for _ in range(3000)]
    frame = pl.DataFrame({"value": values}).lazy()
    staged = StagedRows.write(str(tmp_path / "raw"), dict.fromkeys(SPLITS, frame), ["value"], ["value"])
    monkeypatch.setattr(staged_rows, "COUNTED_AT_ONCE", 30)
    expected = {value: count for value, count in Counter(values).items() if count >= 4}
    assert dict(staged.counts("value", 4).rows()) == expected and 50 < len(expected) < len(set(values))


def test_a_runs_test_file_gives_its_auc_again(tmp_path: Path, ali_ccp_sample: Path) -> None:
    data = prepare("ali-ccp", data_dir=str(ali_ccp_sample), output=str(tmp_path / "data"), form="tables")
    few = {"stages.pretrain.epochs": 1, "stages.adapt.epochs": 1, "batch_size": 32, "backbone_options.hidden": [8]}
    metrics = train(data, str(tmp_path / "run"), method="mlora", **few)
    assert metrics is not None
    found = evaluate(str(tmp_path / "run"), str(ali_ccp_sample / "ali_ccp_test_sample.csv"))
    for name in ("auc", "logloss", "rows"):
        assert found["model"][name] == pytest.approx(metrics["test"][name], abs=1e-6), name
        assert found["backbone"][name] == pytest.approx(metrics["test_backbone"][name], abs=1e-6), name
