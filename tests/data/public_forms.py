"""Small files in the original forms of public data sets, made by seeded generators."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.prepare import prepare


def made(folder: Path, dataset: str, source: Path, **options: Any) -> tuple[Schema, dict[str, pl.DataFrame]]:
    made = prepare(dataset, data_dir=str(source), output=str(folder / "made"), **options)
    return Schema.load(made), {split: pl.read_parquet(f"{made}/{split}.parquet") for split in SPLITS}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def ids(values: Iterable[str | None], least: int) -> dict[str, int]:
    """Ids from 1 of the texts that training rows have often enough, by alphabet."""
    counts = Counter(value for value in values if value is not None)
    return {value: i for i, value in enumerate(sorted(v for v, n in counts.items() if n >= least), 1)}


def review(user: str, item: str, rating: float, day: str) -> dict[str, Any]:
    time = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    return {"reviewerID": user, "asin": item, "overall": rating, "reviewText": "a\tb, é", "unixReviewTime": time}


AMAZON_2014 = ("Clothing_Shoes_and_Jewelry", "Beauty", "Health_and_Personal_Care")


def write_amazon_2014(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(0)
    days = [f"201{year}-0{month}-1{day}" for year in (3, 4) for month in range(1, 8) for day in (0, 9)]
    days += ["2014-02-28", "2014-03-01", "2014-04-30", "2014-05-01"]
    every = []
    for number, stem in enumerate(AMAZON_2014):
        reviews = [
            review(f"u{rng.randrange(12)}", f"i{number}{rng.randrange(5)}", r, d) for d in days for r in (1, 4, 5)
        ]
        reviews += reviews[:2]
        write_lines(folder / f"reviews_{stem}_5.json.gz", map(json.dumps, reviews))
        every += [(stem, row) for row in reviews]
    return every


def write_taobao(folder: Path) -> list[tuple[str, str, str]]:
    rng = random.Random(2)
    clicks = [(f"{rng.randrange(20)}", f"{rng.randrange(60)}", f"{rng.choice('7531')}") for _ in range(800)]
    write_table(
        folder / "theme_click_log.csv",
        ["user_id", "item_id", "leaf_cate_id", "cate_level1_id", "theme_id", "reach_time"],
        [(user, item, 1, 2, theme, "2018-01-01") for user, item, theme in clicks],
    )
    for name, count in (("user", 19), ("item", 60)):  # user 19 has no vector
        vectors = [(i, " ".join(str(i + k / 128) for k in range(128))) for i in range(count)]
        write_table(folder / f"{name}_embedding.csv", [f"{name}_id", "emb"], vectors)
    return clicks


def write_kuairand(folder: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    from torchrec_mdr.data.datasets.kuairand import _DENSE, _USER, _VIDEO

    rng = random.Random(3)
    shown = []
    for log in ("log_standard_4_08_to_4_21_pure", "log_standard_4_22_to_5_08_pure"):
        rows = [
            {
                "user_id": rng.randrange(41),
                "video_id": rng.randrange(30),
                "date": 20220421,
                "is_click": rng.randrange(2),
                "tab": rng.choice((0, 1, 2, 4, 6, 9)),
            }
            for _ in range(400)
        ]
        write_table(folder / f"{log}.csv", list(rows[0]), [list(row.values()) for row in rows])
        shown += rows
    degrees = ("full_active", "high_active", "UNKNOWN")
    users = {
        str(i): {
            "user_id": i,
            **{name: rng.choice(("", "1", "0")) for name in _USER},
            **{name: rng.randrange(1000) for name in _DENSE},
            "user_active_degree": degrees[i % 3],
            "follow_user_num_range": "(0,10]",
        }
        for i in range(40)  # user 40 has no features
    }
    write_table(folder / "user_features_pure.csv", list(users["0"]), [list(row.values()) for row in users.values()])
    videos = [(i, "NORMAL", 1, 720.0, 1280.0, "12,65") for i in range(30)]
    write_table(folder / "video_features_basic_pure.csv", ["video_id", *_VIDEO, "tag"], videos)
    return shown, users


def write_douban(folder: Path) -> list[tuple[str, str, str, str]]:
    rng = random.Random(4)
    ratings = []
    for kind in ("book", "music", "movie"):
        rows = [
            (f"{rng.randrange(15)}", f"{rng.randrange(9)}", rng.choice(("1", "3", "4", "5", ""))) for _ in range(300)
        ]
        table = [(item, user, "a|b", 'say "x"\there', rating) for user, item, rating in rows]
        header = [f"{kind}_id", "user_id", "labels", "comment", "rating"]
        write_table(folder / f"{kind}reviews_cleaned.txt", header, table, "\t")
        ratings += [(kind, *row) for row in rows]
    people = [(i, ("北京", "")[i % 2], f"2008-0{1 + i % 3}-03") for i in range(14)]  # user 14 is unknown
    write_table(folder / "users_cleaned.txt", ["UID", "living_place", "join_time"], people, "\t")
    return ratings


ALI_FIELDS = ("101", "121", "122", "124", "125", "126", "127", "128", "129", "109_14", "110_14", "127_14", "150_14")
ALI_OWN = ("205", "206", "207", "210", "216", "508", "509", "702", "853", "301")


def ali_entries(pairs: Iterable[tuple[str, str, float]]) -> str:
    return "\x01".join(f"{field}\x02{value}\x03{number}" for field, value, number in pairs)


def write_ali_ccp(folder: Path) -> dict[str, list[tuple[int, int, dict[str, str], dict[str, float]]]]:
    rng = random.Random(5)
    every: dict[str, list[tuple[int, int, dict[str, str], dict[str, float]]]] = {}
    for part, count in (("train", 600), ("test", 200)):
        users = {}
        for key in range(40):
            fields = [(name, f"{name}{key % 3}", 1.0) for name in ALI_FIELDS if key or name != "129"]
            fields += [
                ("109_14", f"last{key % 2}", 0.5 + key)
            ]  # the second value of this field, and the one that counts
            users[f"k{key}"] = fields
        write_lines(
            folder / f"common_features_{part}.csv", (f"{k},{len(f)},{ali_entries(f)}" for k, f in users.items())
        )
        rows = []
        for number in range(count):
            key, click, bought = f"k{rng.randrange(40)}", int(rng.random() < 0.3), int(rng.random() < 0.1)
            values = {name: f"{rng.randrange(4)}" for name in ALI_OWN} | {"301": rng.choice(("108", "109", "110"))}
            values["205"] = f"item{number % 100}" if number else "once"
            own = [(name, value, rng.random()) for name, value in values.items()]
            rows.append((number, click, bought, key, len(own), ali_entries(own)))
            all_values = {name: value for name, value, _ in (*users[key], *own)}
            numbers = {name: number for name, _, number in (*users[key], *own)}
            every.setdefault(part, []).append((click, bought, all_values, numbers))
        write_lines(folder / f"sample_skeleton_{part}.csv", (",".join(map(str, row)) for row in rows))
    return every


def criteo_line(rng: random.Random) -> list[str]:
    numbers = [str(rng.randrange(-2, 50)) if rng.random() < 0.8 else "" for _ in range(13)]
    few = [f"{rng.randrange(4):08x}" if rng.random() < 0.9 else "" for _ in range(26)]
    return [str(rng.randrange(2)), *numbers, *few]
