"""Public data sets, from small files of their original form, against plain loops over the lines."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.data.public_forms import (
    ALI_FIELDS,
    ALI_OWN,
    AMAZON_2014,
    criteo_line,
    ids,
    made,
    review,
    write_ali_ccp,
    write_amazon_2014,
    write_douban,
    write_kuairand,
    write_lines,
    write_taobao,
)
from torchrec_mdr.data.datasets.negatives import sample_negatives
from torchrec_mdr.data.datasets.raw_rows import RawRows, lot
from torchrec_mdr.data.schema import SPLITS


def test_amazon_2014(tmp_path: Path) -> None:
    every = write_amazon_2014(tmp_path / "raw")
    schema, frames = made(tmp_path, "amazon-2014", tmp_path / "raw")
    distinct = list({(stem, *(row[k] for k in row if k != "reviewText")): (stem, row) for stem, row in every}.values())
    cuts = ["2014-03-01", "2014-05-01"]
    parts: dict[str, list[tuple[str, dict[str, Any]]]] = {split: [] for split in SPLITS}
    for stem, row in sorted(distinct, key=lambda pair: pair[1]["unixReviewTime"]):
        day = datetime.fromtimestamp(row["unixReviewTime"], UTC).date().isoformat()
        parts[SPLITS[sum(day >= cut for cut in cuts)]].append((stem, row))
    assert schema.source["duplicates_dropped"] == len(every) - len(distinct) > 3
    users = ids((row["reviewerID"] for _, row in parts["train"]), 2)
    items = ids((row["asin"] for _, row in parts["train"]), 2)
    often = Counter(row["reviewerID"] for _, row in parts["train"])
    names = schema.divisions[0].domain_names
    assert sorted(names) == sorted(AMAZON_2014) and len({often[user] > 10 for user in often}) == 2
    for split, rows in parts.items():
        expected = [
            (
                row["overall"] > 3,
                users.get(row["reviewerID"], 0),
                items.get(row["asin"], 0),
                names.index(stem),
                names.index(stem),
                int(often[row["reviewerID"]] > 10),
            )
            for stem, row in rows
        ]
        columns = ["label", "user", "item", "domain", "domain_category", "domain_activity"]
        assert frames[split].select(columns).rows() == expected and schema.rows[split] == len(expected)


def test_amazon_2018_of_the_original_files(tmp_path: Path, amazon_2018: Path) -> None:
    schema, frames = made(tmp_path, "amazon-2018", amazon_2018)
    assert schema.source["duplicates_dropped"] == 16_069 - 12_720 and sum(schema.rows.values()) == 12_720
    lines: set[tuple[Any, ...]] = set()
    for number, name in enumerate(schema.divisions[0].domain_names):
        with gzip.open(amazon_2018 / f"{name}_5.json.gz", "rt") as file:
            rows = map(json.loads, file)
            lines |= {(number, r["reviewerID"], r["asin"], r["overall"], r["unixReviewTime"]) for r in rows}
    times = sorted(line[-1] for line in lines)
    cuts = times[int(0.8 * len(times))], times[int(0.9 * len(times))]
    for place, split in enumerate(SPLITS):
        part = [line for line in lines if sum(line[-1] >= cut for cut in cuts) == place]
        expected = Counter((line[0], line[3] >= 4) for line in part)
        assert Counter(frames[split].select("domain_category", pl.col("label").cast(bool)).rows()) == expected


def test_amazon_6_samples_what_a_user_has_not_reviewed(tmp_path: Path) -> None:
    rng = random.Random(1)
    stems = ["Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Prime_Pantry", "Toys_and_Games"]
    stems += ["Video_Games"]
    reviews: dict[str, set[tuple[str, str]]] = {}
    for stem in stems:
        rows = [review(f"u{rng.randrange(30)}", f"{stem}{rng.randrange(40)}", 2, "2017-01-01") for _ in range(150)]
        reviews[stem] = {(row["reviewerID"], row["asin"]) for row in rows}
        write_lines(tmp_path / "raw" / f"{stem}_5.json", map(json.dumps, rows))
    schema, frames = made(tmp_path, "amazon-6", tmp_path / "raw")
    rows = pl.concat(frames.values())
    for stem, rate in schema.source["click_rates"].items():
        part = rows.filter(pl.col("domain") == schema.divisions[0].domain_names.index(stem))
        assert part["label"].sum() == len(reviews[stem])
        items = len({item for _, item in reviews[stem]})
        wanted = sum(min(int(n / rate), items - n) for n in Counter(user for user, _ in reviews[stem]).values())
        assert 0.2 <= rate <= 0.5 and (part["label"] == 0).sum() == wanted


def test_negatives_against_a_loop_over_users() -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 50, 400), (20 * rng.random(400) ** 3).astype(np.int64)
    pairs = np.unique(users * 20 + items)  # some users have clicked nearly everything
    found_users, found_items = sample_negatives(np.random.default_rng(1), pairs // 20, pairs % 20, 20, 0.3)
    found = Counter(zip(found_users.tolist(), found_items.tolist(), strict=True))
    assert max(found.values()) == 1
    full = 0
    for user in set((pairs // 20).tolist()):
        clicked = {pair % 20 for pair in pairs.tolist() if pair // 20 == user}
        drawn = {item for owner, item in found if owner == user}
        assert len(drawn) == min(int(len(clicked) / 0.3), 20 - len(clicked)) and not drawn & clicked
        full += len(drawn) == 20 - len(clicked)
    assert 0 < full < 50
    many = sample_negatives(np.random.default_rng(2), np.arange(5000), np.zeros(5000, dtype=np.int64), 50, 0.2)[1]
    assert np.bincount(many, minlength=50)[1:].min() > 400  # of about 510: every free item is as likely


def test_taobao_themes(tmp_path: Path) -> None:
    clicks = write_taobao(tmp_path / "raw")
    schema, frames = made(tmp_path, "taobao-themes", tmp_path / "raw", themes=3)
    themes = list(dict.fromkeys(theme for *_, theme in clicks))[:3]
    names = schema.divisions[0].domain_names
    assert sorted(names) == sorted(themes)
    positive = {click for click in clicks if click[2] in themes and click[0] != "19"}
    rows = pl.concat(frames.values())
    assert [feature.name for feature in schema.sparse_features] == ["domain"] and len(schema.dense_features) == 256
    vectors = rows.select("user_0", "user_127", "item_0", "item_64").to_numpy()
    assert np.allclose(vectors[:, 1] - vectors[:, 0], 127 / 128) and np.allclose(vectors[:, 3] - vectors[:, 2], 0.5)
    found = rows.filter(pl.col("label") == 1).select("user_0", "item_0", "domain").rows()
    assert sorted((str(int(u)), str(int(i)), names[d]) for u, i, d in found) == sorted(positive)
    negative = rows.filter(pl.col("label") == 0).select("user_0", "item_0", "domain").rows()
    assert not {(str(int(u)), str(int(i)), names[d]) for u, i, d in negative} & positive
    for domain in range(3):
        for label in (0, 1):
            sizes = [frames[s].filter(pl.col("domain") == domain, pl.col("label") == label).height for s in SPLITS]
            assert all(abs(n / sum(sizes) - share) < 0.02 for n, share in zip(sizes, (0.6, 0.2, 0.2), strict=True))


def test_taobao_themes_by_ids(tmp_path: Path) -> None:
    write_taobao(tmp_path / "raw")
    schema, _ = made(tmp_path, "taobao-themes", tmp_path / "raw", themes=2, vectors=False)
    assert [feature.name for feature in schema.sparse_features] == ["user", "item", "domain"]
    assert schema.dense_features == ()


def test_kuairand(tmp_path: Path) -> None:
    shown, users = write_kuairand(tmp_path / "raw")
    schema, frames = made(tmp_path, "kuairand-pure", tmp_path / "raw")
    kept = [row for row in shown if row["tab"] != 9 and row["user_id"] != 40]
    rows = pl.concat(frames.values())
    assert schema.divisions[0].domain_names == ("0", "1", "2", "4", "6")
    expected = Counter((row["is_click"], (0, 1, 2, 4, 6).index(row["tab"])) for row in kept)
    assert Counter(rows.select(pl.col("label").cast(int), "domain_tab").rows()) == expected
    assert abs(schema.rows["train"] / len(kept) - 0.8) < 0.05 and len(schema.sparse_features) == 2 + 26 + 4 + 1
    # each user's dense features, scaled by the users of training rows
    by_id = frames["train"].group_by("user_id").agg(pl.col("fans_user_num").unique())
    texts = ids((str(i) for i in range(40)), 1)  # every user has two training rows or more
    assert sorted(by_id["user_id"]) == sorted(texts.values())
    fans = {texts[user]: row["fans_user_num"] for user, row in users.items()}
    low, high = min(fans.values()), max(fans.values())
    for user, values in by_id.rows():
        assert values == [pytest.approx((fans[user] - low) / (high - low), abs=1e-6)]
    assert schema.division("user_active_degree").domain_names == ("UNKNOWN", "full_active", "high_active")


def test_douban(tmp_path: Path) -> None:
    ratings = write_douban(tmp_path / "raw")
    schema, frames = made(tmp_path, "douban", tmp_path / "raw")
    order = np.random.default_rng(2024).permutation(len(ratings))
    train = [ratings[i] for i in order[:720]]
    users = ids((user for _, user, _, _ in train), 2)
    items = ids((f"{kind} {item}" for kind, _, item, _ in train), 2)
    often = Counter(user for _, user, _, _ in train)
    names = schema.divisions[0].domain_names
    expected = [
        (rating in ("4", "5"), users[user], items[f"{kind} {item}"], names.index(kind), int(often[user] > 50))
        for kind, user, item, rating in train
    ]
    assert frames["train"].select("label", "user", "item", "domain", "domain_activity").rows() == expected
    places = dict(frames["train"].select("user", "place").unique().rows())
    months = dict(frames["train"].select("user", "joined").unique().rows())
    assert places == {users[str(i)]: int(i % 2 == 0 and i < 14) for i in range(15)}
    assert months == {users[str(i)]: 1 + i % 3 if i < 14 else 0 for i in range(15)}


def test_ali_ccp_of_the_original_form(tmp_path: Path) -> None:
    every = write_ali_ccp(tmp_path / "raw")
    schema, frames = made(tmp_path, "ali-ccp", tmp_path / "raw")
    kept = [row for row in every["train"] if row[0] or not row[1]]
    assert len(kept) < 600 and schema.rows["train"] == len(kept)
    assert schema.divisions[0].domain_names == ("108", "109", "110")
    columns: dict[str, list[float]] = {"label": [row[0] for row in kept]}
    columns["domain_scenario"] = [("108", "109", "110").index(row[2]["301"]) for row in kept]
    for name in (*ALI_FIELDS, *ALI_OWN[:-1]):
        known = ids((row[2].get(name) for row in kept), 10)
        columns[name] = [known.get(row[2].get(name, ""), 0) for row in kept]
    assert 0 in columns["205"] and 0 in columns["129"]  # too rare, and missing
    for name in ("109_14", "508"):
        numbers = [row[3][name] for row in kept]
        columns[f"D{name}"] = [(n - min(numbers)) / (max(numbers) - min(numbers)) for n in numbers]
    for name, expected in columns.items():
        assert frames["train"][name].to_list() == pytest.approx(expected, abs=1e-6), name
    halves = pl.concat([frames["validation"], frames["test"]])
    assert halves.height == sum(row[0] or not row[1] for row in every["test"]) and 60 < schema.rows["test"] < 140


def test_ali_ccp_of_scenario_wise_recs_sample(tmp_path: Path, ali_ccp_sample: Path) -> None:
    schema, frames = made(tmp_path, "ali-ccp", ali_ccp_sample, form="tables")
    assert schema.rows == {"train": 100, "validation": 50, "test": 50}
    with (ali_ccp_sample / "ali_ccp_train_sample.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = frames["train"]
    assert train["label"].to_list() == [float(row["click"]) for row in rows]
    names = schema.divisions[0].domain_names
    assert [names[i] for i in train["domain_scenario"]] == [row["301"] for row in rows]
    items = ids((row["205"] for row in rows), 1)
    assert train["205"].to_list() == [items[row["205"]] for row in rows]
    assert train["D509"].to_list() == pytest.approx([float(row["D509"]) for row in rows])


def test_criteo(tmp_path: Path) -> None:
    rng = random.Random(6)
    lines = [criteo_line(rng) for _ in range(700)]
    write_lines(tmp_path / "raw" / "day_0.gz", map("\t".join, lines[:300]))
    write_lines(tmp_path / "raw" / "day_1", map("\t".join, lines[300:]))
    options = {"files": "day_0.gz,day_1", "min_count": 5, "min_rows": 130}
    schema, frames = made(tmp_path, "criteo", tmp_path / "raw", **options)
    assert schema.rows["train"] == 600 and schema.rows["validation"] + schema.rows["test"] == 100
    train = lines[:600]
    columns: dict[str, list[float]] = {"label": [float(line[0]) for line in train]}
    for i in range(13):
        columns[f"I{i + 1}"] = [np.log1p(max(int(line[1 + i] or 0), 0)) for line in train]
    for i in range(26):
        known = ids((line[14 + i] or None for line in train), 5)
        columns[f"C{i + 1}"] = [known.get(line[14 + i], 0) for line in train]
    for name, expected in columns.items():
        assert frames["train"][name].to_list() == pytest.approx(expected, rel=1e-6), name
    counts = Counter(line[14 + 8] or "missing" for line in train)
    names = schema.divisions[0].domain_names
    assert sorted(names[:-1]) == sorted(name for name, n in counts.items() if n >= 130) and names[-1] == "rare"
    found = [names[i] for i in frames["train"]["domain_C9"]]
    assert found == [name if counts[name] >= 130 else "rare" for name in (line[22] or "missing" for line in train)]


def test_lots_depend_on_index_and_seed_alone() -> None:
    rows = pl.DataFrame({"row": np.arange(20_000)})
    drawn = rows.select(lot(pl.col("row"), 7))["row"]
    assert rows[5000:].select(lot(pl.col("row"), 7))["row"].equals(drawn[5000:])
    assert abs(np.corrcoef(drawn, rows.select(lot(pl.col("row"), 8))["row"])[0, 1]) < 0.03
    assert np.abs(np.histogram(drawn, 20, (0, 1))[0] - 1000).max() < 150
    # SplitMix64 of 3 x 0x9E3779B97F4A7C15 + 7, in whole numbers of any size
    mask = (1 << 64) - 1
    bits = (3 * 0x9E3779B97F4A7C15 + 7) & mask
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    assert drawn[3] == ((bits ^ (bits >> 31)) >> 11) / 2**53


def test_a_domain_without_training_rows(tmp_path: Path) -> None:
    frame = pl.DataFrame({"label": [0, 1], "a": ["x", "y"], "b": ["x", "x"]}).lazy()
    other = pl.DataFrame({"label": [0], "a": ["x"], "b": ["z"]}).lazy()
    splits = {"train": frame, "validation": other, "test": other}
    with pytest.raises(ValueError, match="1 rows of split validation are in domains of division 'b' that no training"):
        RawRows(splits, sparse=("a",), divisions=("b",)).write(str(tmp_path), "x")
