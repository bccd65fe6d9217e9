"""Raw rows to ids and numbers, against a loop over rows in plain Python."""

from __future__ import annotations

import math
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from torchrec_mdr.data.features import (
    DensePlan,
    DivisionPlan,
    FeaturePlan,
    LabelPlan,
    SparsePlan,
    Vocabularies,
    copy_features,
    has_features,
)

USERS = ["7", "9007199254740993", "-1"]
GENRES = ["a", "b", "c"]


def vocabulary(values: list[str], first: int = 2) -> pl.DataFrame:
    ids = list(range(first, first + len(values)))
    return pl.DataFrame({"value": values, "id": ids}, schema={"value": pl.String, "id": pl.Int64})


def plan(**changes: Any) -> FeaturePlan:
    parts: dict[str, Any] = {
        "dataset": "d",
        "label": LabelPlan("clicked", "clicked"),
        "sparse": (
            SparsePlan("user", "user", 5, form="integer", vocabulary="user"),
            SparsePlan("session", "session", 1000),
            SparsePlan("genres", "genres", 5, kind="list", vocabulary="genres", separator="|", max_length=2),
            SparsePlan("time_hour", "time", 25, kind="time", part="hour"),
            SparsePlan("member", "member", 4, form="boolean", vocabulary="member", has_missing=False),
        ),
        "dense": (
            DensePlan("price", "price", log1p=True, median=2, mean=1, std=2),
            DensePlan("p?", "price", "missing"),
        ),
        "divisions": (DivisionPlan("shop", "shop", ("Oslo", "rare")),),
        "vocabularies": Vocabularies(
            {
                "user": vocabulary(USERS),
                "genres": vocabulary(GENRES),
                "member": vocabulary(["false", "true"]),
                "domain_shop": pl.DataFrame({"value": ["Oslo", "Lima", "Rome"], "id": [0, 1, 1]}),
            }
        ),
    }
    return FeaturePlan(**(parts | changes))


ROWS: list[dict[str, Any]] = [
    {"user": 7, "session": "s", "genres": ["a", "x", "c"], "time": "2024-03-01 05:00:00", "member": True, "price": 3.5},
    {"user": 2**53 + 1, "session": "t", "genres": [], "time": "2024-03-01", "member": False, "price": None},
    {"user": None, "session": None, "genres": None, "time": None, "member": None, "price": 1e9},
    {"user": 8, "session": "s", "genres": ["c", None], "time": "01.03.2024 23:59", "member": True, "price": -3.0},
]
SHOPS = ["Oslo", "Lima", "Cork", None]
LABELS = [1, 0, 1, 0]


def frame() -> pl.DataFrame:
    return pl.DataFrame([{**row, "shop": s, "clicked": c} for row, s, c in zip(ROWS, SHOPS, LABELS, strict=True)])


def known(values: list[str], value: Any) -> int:
    return 0 if value is None else 2 + values.index(str(value)) if str(value) in values else 1


def expected(row: dict[str, Any]) -> dict[str, Any]:
    genres = row["genres"]
    price = 2 if row["price"] is None else row["price"]
    scaled = (math.copysign(math.log1p(abs(price)), price) - 1) / 2
    return {
        "user": known(USERS, row["user"]),
        "genres": [0] if genres is None else [known(GENRES, entry) for entry in genres if entry is not None][:2],
        "time_hour": {"2024-03-01 05:00:00": 6, "2024-03-01": 1, None: 0, "01.03.2024 23:59": 24}[row["time"]],
        "member": {True: 3, False: 2, None: 1}[row["member"]],
        "price": pytest.approx(max(-10, min(10, scaled)), rel=1e-6),
        "p?": float(row["price"] is None),
    }


def as_text(rows: pl.DataFrame) -> pl.DataFrame:
    """The same rows as CSV has them."""
    genres = pl.col("genres").list.join("|", ignore_nulls=True)
    text = rows.with_columns(
        pl.when(pl.col("genres").list.len() == 0).then(pl.lit("[]")).otherwise(genres).alias("genres")
    )
    return text.with_columns(pl.exclude("genres").cast(pl.String))


@pytest.mark.parametrize("form", ["typed", "text", "floats"])
def test_rows_become_what_a_loop_makes_of_them(form: str) -> None:
    rows = {
        "typed": frame(),
        "text": as_text(frame()),
        "floats": frame().with_columns(pl.col("clicked").cast(pl.Float64)),
    }
    encoded = plan().encode(rows[form], need_label=True)
    assert encoded.errors.to_list() == [None] * 4
    for got, row, label in zip(encoded.columns.to_dicts(), ROWS, LABELS, strict=True):
        wanted = expected(row)
        assert {name: got[name] for name in wanted} == wanted and got["clicked"] == label
    assert encoded.columns["domain_shop"].to_list() == [0, 1, -1, -1]
    assert encoded.unknown["shop"].to_list() == [False, False, True, True]
    sessions = encoded.columns["session"].to_list()
    assert sessions[0] == sessions[3] != sessions[1] and sessions[2] == 0 and max(sessions) < 1000


def test_hashed_ids_are_the_same_on_every_machine() -> None:
    assert plan().encode(frame()).columns["session"].to_list() == [152, 422, 0, 152]  # blake2b, as b2sum -l 64 gives it


def test_a_bad_row_has_a_reason_and_the_others_none() -> None:
    rows = as_text(frame()).with_columns(
        pl.Series("price", ["1", "abc", "inf", "NaN"]), pl.Series("time", ["2024-01-01", None, "", "soon"])
    )
    encoded = plan().encode(rows)
    assert encoded.errors.to_list() == [
        None,
        "column 'price': 'abc' is no finite number",
        "column 'price': 'inf' is no finite number",
        "column 'time': 'soon' is no date or time",
    ]
    assert encoded.columns["price"].is_finite().all() and "clicked" not in encoded.columns.columns


@pytest.mark.parametrize(
    ("label", "values", "wanted", "bad"),
    [
        (LabelPlan("y", "c"), [True, False, True], [1, 0, 1], []),
        (LabelPlan("y", "c", negative=-1), [1, -1, 0], [1, 0, 0], [2]),
        (LabelPlan("y", "c"), ["yes", "0", None], [1, 0, 0], [2]),
        (LabelPlan("y", rule="c > 3"), [5, 3, None], [1, 0, 0], [2]),
        (LabelPlan("y", rule="c > 3"), ["5", "10", "x"], [1, 1, 0], [2]),
        (LabelPlan("y", rule="c = '>50K'"), [">50K", "<=50K", ">50K"], [1, 0, 1], []),
        (LabelPlan("y", rule="c >= 3.5 AND d = 'b'"), ["4", "4", "1"], [0, 1, 0], []),
    ],
)
def test_labels(label: LabelPlan, values: list[Any], wanted: list[int], bad: list[int]) -> None:
    rows = pl.DataFrame({"c": values, "d": ["a", "b", "c"], "shop": ["Oslo"] * 3})
    encoded = plan(label=label, sparse=(), dense=()).encode(rows, need_label=True)
    assert encoded.columns["y"].to_list() == wanted
    assert encoded.errors.is_not_null().arg_true().to_list() == bad


def test_weights_are_of_mean_one_and_bad_ones_are_errors() -> None:
    rows = frame().with_columns(w=pl.Series([3.0, -1.0, None, 1.5]))
    encoded = plan(weight="w", weight_mean=1.5).encode(rows, need_label=True)
    assert encoded.columns["row_weight"].to_list() == [2, 0, 0, 1]
    assert encoded.errors.is_not_null().to_list() == [False, True, True, False]


def test_types_of_parquet_that_have_no_twin_in_csv() -> None:
    rows = pl.DataFrame(
        {
            "user": pl.Series([Decimal("7"), None], dtype=pl.Decimal(20, 0)),
            "session": pl.Series(["a", None], dtype=pl.Categorical),
            "genres": pl.Series([["a", "b"], ["c", "c"]], dtype=pl.Array(pl.String, 2)),
            "time": [datetime(2024, 3, 1, 7), None],
            "member": ["TRUE", "No"],
            "price": pl.Series([Decimal("1.50"), None], dtype=pl.Decimal(10, 2)),
            "shop": ["Oslo", "Oslo"],
        }
    )
    encoded = plan().encode(rows).columns
    assert encoded["user"].to_list() == [2, 0] and encoded["genres"].to_list() == [[2, 3], [4, 4]]
    assert encoded["member"].to_list() == [3, 2] and encoded["time_hour"].to_list() == [8, 0]
    assert plan().encode(rows.with_columns(time=pl.lit(date(2024, 1, 1)))).columns["time_hour"].to_list() == [1, 1]
    seconds = plan(sparse=(SparsePlan("m", "time", 13, kind="time", part="month", unit="s"),))
    assert seconds.encode(rows.with_columns(time=pl.lit(1709251200))).columns["m"].to_list() == [3, 3]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = plan(left_out={"note": "free text"}, weight="w")
    made.save(str(tmp_path))
    read = FeaturePlan.load(str(tmp_path))
    assert read == made and read.vocabularies.sizes == made.vocabularies.sizes
    rows = frame().with_columns(w=1.0)
    assert read.encode(rows, need_label=True).columns.equals(made.encode(rows, need_label=True).columns)
    (tmp_path / "run").mkdir()
    assert copy_features(str(tmp_path), str(tmp_path / "run")) and has_features(str(tmp_path / "run"))
    assert not copy_features(str(tmp_path / "no"), str(tmp_path))


def test_a_vocabulary_without_values_is_read_again(tmp_path: Path) -> None:
    made = plan()
    nothing = pl.DataFrame(schema={"value": pl.String, "id": pl.Int64})  # of a column whose values are all too rare
    object.__setattr__(made, "vocabularies", Vocabularies({**made.vocabularies.tables, "code": nothing}))
    made.save(str(tmp_path))
    assert FeaturePlan.load(str(tmp_path)).vocabularies.sizes == made.vocabularies.sizes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format_version: 1", "format_version: 2", "format_version must be 1, not 2"),
        ("num_embeddings: 5", "num_embeddings: five", r"sparse\[0\].num_embeddings must be a whole number, not 'five'"),
        ("kind: list", "kind: bag", r"sparse\[2\].kind must be one of category, list, time, domain, not 'bag'"),
        ("log1p: true", "log: true", r"dense\[0\] has the unknown field 'log'"),
        ("user: 3", "user: 4", "vocabularies.parquet does not belong to features.yaml"),
        ("label:", "{", "is not valid YAML"),
    ],
)
def test_a_damaged_plan_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    plan().save(str(tmp_path))
    path = tmp_path / "features.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        FeaturePlan.load(str(tmp_path))


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the rows have no column 'user', 'price', which training rows had"):
        plan().encode(frame().drop("user", "price"))
    with pytest.raises(ValueError, match=r"has no features.yaml.*prepare --input"):
        FeaturePlan.load(str(tmp_path))
