"""Own tables become prepared data: kinds, vocabularies, scaling, splits and domains, against loops over rows."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.data.raw import SHOPS, kinds, prepare, rows, split
from torchrec_mdr.data.features import FeaturePlan
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.prepare import main

FOLDS = ["train"] * 8 + ["validation", "test"]


def with_folds(count: int = 2000) -> pl.DataFrame:
    return rows(count).with_columns(fold=pl.Series(FOLDS * (count // 10)))


def test_the_form_of_the_file_does_not_matter(tmp_path: Path) -> None:
    table = rows(600)
    table.write_csv(tmp_path / "a.csv")
    table.write_ndjson(tmp_path / "a.jsonl")
    table.head(200).write_parquet(tmp_path / "part-0.parquet")
    table.tail(400).write_parquet(tmp_path / "part-1.parquet")
    made = {}
    for form, paths in {"csv": ["a.csv"], "json": ["a.jsonl"], "parquet": ["part-0.parquet", "part-1.parquet"]}.items():
        (tmp_path / form).mkdir()
        made[form] = prepare([tmp_path / path for path in paths], tmp_path / form)
        assert kinds(made[form]) == {
            **dict.fromkeys(("user_id", "item", "shop"), "category"),
            **dict.fromkeys(("price", "age", "member"), "number"),
            **{"genres": "list", "time": "timestamp", "constant": "none", "request": "none"},
        }, form
    for name in SPLITS:
        assert all(split(made[form], name).equals(split(made["csv"], name)) for form in made)
    assert len({(made[form].schema.sparse_features, made[form].schema.divisions) for form in made}) == 1


def test_every_value_is_what_a_loop_over_rows_makes_of_it(tmp_path: Path) -> None:
    raw = with_folds()
    made = prepare(raw, tmp_path, split="column:fold", min_count=15)
    train = raw.filter(pl.col("fold") == "train")
    ids = {}
    for name in ("item", "user_id"):
        counts = Counter(str(value) for value in train[name] if value is not None)
        kept = sorted((value for value in counts if counts[value] >= 15), key=lambda value: (-counts[value], value))
        ids[name] = {value: 2 + place for place, value in enumerate(kept)}
    assert 0 < len(ids["user_id"]) < train["user_id"].n_unique()  # some are rare
    prices = np.log1p(np.array([price for price in train["price"] if price is not None]))
    median = float(np.median([price for price in train["price"] if price is not None]))
    ages = train["age"].to_numpy()
    for name in SPLITS:
        wanted, got = raw.filter(pl.col("fold") == name), split(made, name)
        assert len(got) == len(wanted) == made.schema.rows[name]
        for row, encoded in zip(wanted.iter_rows(named=True), got.iter_rows(named=True), strict=True):
            assert encoded["item"] == ids["item"].get(row["item"], 1)
            assert encoded["user_id"] == ids["user_id"].get(str(row["user_id"]), 1)
            assert encoded["domain_shop"] == SHOPS.index(row["shop"]) and encoded["clicked"] == row["clicked"]
            price = np.log1p(median if row["price"] is None else row["price"])
            assert encoded["price"] == pytest.approx((price - prices.mean()) / prices.std(), rel=1e-4, abs=1e-4)
            assert encoded["price_missing"] == (row["price"] is None)
            assert encoded["age"] == pytest.approx((row["age"] - ages.mean()) / ages.std(), rel=1e-4, abs=1e-4)
            assert encoded["time_hour"] == row["time"].hour + 1 and encoded["time_weekday"] == row["time"].isoweekday()
            assert len(encoded["genres"]) == max(row["genres"].count("|") + 1, 1)


def test_what_was_written_is_what_the_plan_makes_and_what_the_loader_reads(tmp_path: Path) -> None:
    raw = with_folds(500)
    made = prepare(raw, tmp_path, split="column:fold", auxiliary="member", weight="age")
    plan = FeaturePlan.load(made.folder)
    for name in SPLITS:
        again = plan.encode(raw.filter(pl.col("fold") == name), need_label=True)
        assert again.columns.equals(split(made, name)) and again.errors.null_count() == len(again)
    schema = Schema.load(made.folder)
    assert schema == plan.schema(schema.rows, schema.source) and schema.weight == "row_weight"
    loader = DomainLoader(made.folder, schema, "train", ["shop", "member"], 128, shuffle=True)
    assert sum(len(batch.labels) for batch in loader.batches(0)) == 400
    assert split(made, "train")["row_weight"].mean() == pytest.approx(1)


def test_splits(tmp_path: Path) -> None:
    raw = rows(1000).sample(fraction=1, shuffle=True, seed=0).with_columns(day=pl.col("time").dt.date())
    made = prepare(raw, tmp_path / "random", split="random:0.7,0.2")
    assert made.schema.rows == {"train": 700, "validation": 200, "test": 100}
    made = prepare(raw, tmp_path / "time", split="time:day:0.7,0.2", lists="request", separator="/", min_count=1)
    where = {request: day for request, day in raw.select("request", "day").iter_rows()}
    numbers = made.decision.plan.vocabularies.tables["request"]
    names = dict(zip(numbers["id"], numbers["value"], strict=True))
    last = max(where[names[entry[0]]] for entry in split(made, "train")["request"])
    days = sorted(raw["day"])
    assert days[690] <= last < days[700] or last == days[699] and made.schema.rows["train"] <= 700
    assert sum(day <= last for day in days) == made.schema.rows["train"]  # no day in two splits
    raw.head(600).write_parquet(tmp_path / "a.parquet")
    raw.slice(600, 300).write_csv(tmp_path / "b.csv")
    own = {"test_input": [str(tmp_path / "b.csv")]}
    made = prepare([tmp_path / "a.parquet"], tmp_path / "files", **own)
    assert made.schema.rows == {"train": 533, "validation": 67, "test": 300}  # .8 and .1, without a test to cut
    own["validation_input"] = [str(tmp_path / "b.csv")]
    made = prepare([tmp_path / "a.parquet"], tmp_path / "all", **own)
    assert made.schema.rows == {"train": 600, "validation": 300, "test": 300}


def test_labels_by_rule_and_what_the_rule_reads_is_no_feature(tmp_path: Path) -> None:
    raw = rows(500).rename({"clicked": "rating"}).with_columns(pl.col("rating") * 2 + 1)
    made = prepare(raw, tmp_path, label="liked", label_rule="rating > 2")
    assert made.schema.label == "liked" and "rating" not in kinds(made)
    assert made.decision.plan.left_out["rating"] == "makes the label"
    total = sum(split(made, name)["liked"].sum() for name in SPLITS)
    assert total == (raw["rating"] > 2).sum()
    # a column that is excluded may still make the label, and one of the label's name is no feature
    twin = raw.with_columns(liked=pl.col("rating"))
    made = prepare(twin, tmp_path / "twin", label="liked", label_rule="rating > 2", exclude="rating")
    assert {"rating", "liked"}.isdisjoint(kinds(made)) and "liked" in made.decision.plan.left_out
    assert sum(split(made, name)["liked"].sum() for name in SPLITS) == total
    for values in ((False, True), (-1, 1), ("no", "yes")):
        own = rows(500).with_columns(pl.Series("clicked", [values[i] for i in rows(500)["clicked"]]))
        other = prepare(own, tmp_path / str(values))
        assert sum(split(other, name)["clicked"].sum() for name in SPLITS) == total


def test_domains(tmp_path: Path) -> None:
    raw = with_folds().with_columns(
        shop=pl.when(pl.col("age") == 18).then(pl.lit("tiny")).when(pl.col("age") == 19).then(None).otherwise("shop"),
        zone=pl.when((pl.col("fold") == "test") & (pl.col("age") < 30)).then(9).otherwise(pl.col("age") % 3 + 10),
    )
    counts = Counter(raw.filter(pl.col("fold") == "train")["shop"])
    options = {"split": "column:fold", "min_rows": counts["tiny"] + 1, "auxiliary": "zone"}
    made = prepare(raw, tmp_path, **options)
    shop, zone = made.schema.divisions
    assert shop.names == (*SHOPS, "(rare)", "(missing)") and zone.names == ("10", "11", "12")
    train = Counter(split(made, "train")["domain_shop"])
    assert [train[i] for i in range(6)] == [counts[name] for name in (*SHOPS, "tiny", None)]
    lost = len(raw.filter(pl.col("fold") == "test", pl.col("zone") == 9))
    assert made.schema.rows["test"] == 200 - lost > 0
    assert f"{lost} rows of split 'test' are left out, as no training row has their domain" in made.warnings
    assert {"shop", "zone"} <= {feature.name for feature in made.schema.sparse_features}
    bare = prepare(raw, tmp_path / "bare", **options, domain_feature=False)
    assert not {"shop", "zone"} & {feature.name for feature in bare.schema.sparse_features}


def test_options_override_what_is_inferred(tmp_path: Path) -> None:
    raw = rows(600).with_columns(
        a=pl.col("age") % 7, b=pl.col("age") % 9, seconds=pl.col("time").dt.epoch("s"), words=pl.lit("x y")
    )
    made = prepare(
        raw,
        tmp_path,
        sparse="age",
        dense="a",
        lists="words",
        timestamps="seconds",
        hash="item:100",
        share=["user_id,b"],
        exclude="price, request",
        max_length=1,
        pooling="sum",
        min_count=1,
    )
    sparse = {feature.name: feature for feature in made.schema.sparse_features}
    assert {"age", "seconds_hour", "words"} <= set(sparse) and "a" in made.schema.dense_features
    assert sparse["item"].num_embeddings == 100 and sparse["words"].pooling == "sum" and sparse["words"].multi_hot
    assert split(made, "train")["words"].list.len().max() == 1
    assert sparse["user_id"].num_embeddings == sparse["b"].num_embeddings
    train = split(made, "train")
    assert set(train["b"]).isdisjoint(train["user_id"])  # one vocabulary: different values have different ids
    assert not {"price", "request"} & set(kinds(made))


def test_kinds_that_need_care(tmp_path: Path) -> None:
    count = 1000
    base = rows(count)
    raw = base.with_columns(
        zip=pl.col("age").cast(pl.String).str.zfill(5),
        float_id=pl.when(pl.col("age") > 20).then(pl.col("user_id").cast(float)),
        huge=pl.col("age").cast(pl.UInt64) + 2**63,
        money=pl.Series([Decimal(i) / 100 for i in range(count)], dtype=pl.Decimal(10, 2)),
        tags=pl.col("genres").str.split("|"),
        pair=pl.concat_list("age", "constant").list.to_array(2),
        review=pl.concat_str(pl.lit("what I think of it, in many words: "), "request"),
        moment=pl.col("time").dt.epoch("ms").alias("moment"),
        place=pl.struct(pl.col("shop").alias("name"), pl.col("age").alias("rank_age")),
        empty=pl.lit(None, pl.Float64),
        vector=pl.concat_list("price", "price"),
    ).with_columns(created_at=pl.col("moment"))
    found = kinds(prepare(raw, tmp_path))
    wanted = {
        "zip": "category",
        "float_id": "category",
        "huge": "category",
        "money": "number",
        "tags": "list",
        "pair": "list",
        "review": "none",
        "created_at": "timestamp",
        "place.name": "category",
        "place.rank_age": "number",
        "empty": "none",
        "vector": "none",
    }
    assert {name: found[name] for name in wanted} == wanted


def test_the_report_shows_what_a_loop_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = with_folds(500).with_columns(pl.col("age") + 30 * (pl.col("fold") == "test"))
    raw.write_csv(tmp_path / "rows.csv")
    output = tmp_path / "made"
    given = f"--input {tmp_path}/rows.csv --label clicked --domain shop --split column:fold --output {output} --report"
    assert main(given.split()) == 0
    told = capsys.readouterr().out
    assert re.search(r"^request +left out +another value in \(almost\) every row$", told, re.MULTILINE)
    assert f"report: {output}/report.html" in told and told.endswith(
        f"train on it: python -m torchrec_mdr.train --dataset {output}/\n"
    )
    page = re.sub(r"<[^>]+>", " ", (output / "report.html").read_text().replace("\n", " "))
    page = re.sub(r"\s+", " ", page)
    for shop in SHOPS:
        parts = [raw.filter(pl.col("shop") == shop, pl.col("fold") == name) for name in SPLITS]
        rates = [f"{part['clicked'].mean():.4f}" for part in parts]
        assert f"{shop} {' '.join(str(len(part)) for part in parts)} {' '.join(rates)}" in page
    missing = [raw.filter(pl.col("fold") == name)["price"].is_null().mean() for name in SPLITS]
    assert f"price {' '.join(f'{share:.2%}' for share in missing)}" in page
    drift = dict(re.findall(r" (age|member) [\d.]+ ([\d.]+)", page[page.index(" Drift ") :]))
    assert float(drift["age"]) > 0.25 > float(drift["member"])  # test rows are of older people
