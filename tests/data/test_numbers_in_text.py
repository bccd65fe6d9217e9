"""Numbers as people write them in text: decimal commas, and marks between thousands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.data.raw import prepare, rows, split
from torchrec_mdr.data.features import FeaturePlan
from torchrec_mdr.data.features.keys import Marks
from torchrec_mdr.data.importing.prepare import Imported

PRICES = np.exp(np.random.default_rng(3).normal(5, 2, 1000)).round(2)


def german(value: float) -> str:
    return f"{value:,.2f}".translate(str.maketrans(",.", ".,"))


def with_prices(folder: Path, prices: list[str], **options: str) -> Imported:
    """Prepares a CSV file whose prices are these texts."""
    folder.mkdir(exist_ok=True)
    rows(1000).with_columns(price=pl.Series(prices)).write_csv(folder / "rows.csv", separator=";")
    return prepare([folder / "rows.csv"], folder, split="time:time", **options)


def test_numbers_are_the_same_however_they_are_marked(tmp_path: Path) -> None:
    forms = {"plain": str, "comma": lambda x: str(x).replace(".", ","), "german": german, "english": "{:,.2f}".format}
    found = {name: with_prices(tmp_path / name, [form(x) for x in PRICES]) for name, form in forms.items()}
    marks = {name: one.decision.plan.dense[0].marks for name, one in found.items()}
    assert marks == {"plain": "plain", "comma": "comma", "german": "comma", "english": "thousands"}
    for imported in found.values():
        for part in ("train", "test"):
            assert split(imported, part)["price"].to_list() == split(found["plain"], part)["price"].to_list()
    plan = FeaturePlan.load(found["german"].folder)  # what predict does
    new = rows(40).head(4).with_columns(price=pl.Series(["1.234,5", "12,5", "", "12.5"]))
    encoded = plan.encode(new)
    wanted = FeaturePlan.load(found["plain"].folder).encode(new.with_columns(price=pl.Series([1234.5, 12.5, None, 0])))
    assert encoded.columns["price"][:3].to_list() == wanted.columns["price"][:3].to_list()
    assert encoded.errors.to_list() == [None, None, None, "column 'price': '12.5' is no finite number"]
    assert plan.encode(new.with_columns(price=12.5)).errors.null_count() == 4


def test_missing_ones_and_faulty_ones_among_them(tmp_path: Path) -> None:
    texts = [german(x) for x in PRICES]
    texts[2], texts[5] = "NA", "?"  # and no empty one
    imported = with_prices(tmp_path / "a", texts)
    assert [feature.name for feature in imported.decision.plan.dense][:2] == ["price", "price_missing"]
    assert split(imported, "train")["price_missing"].sum() == 2
    texts[7] = "much"
    with pytest.raises(ValueError, match="row 7 .*: column 'price' holds numbers, but 'much' here is no finite one"):
        with_prices(tmp_path / "b", texts)


@pytest.mark.parametrize(
    ("texts", "marks"),
    [
        (["1,234", "598", "2,001"], None),  # either of two
        (["1,234", "0,598"], "comma"),
        (["1,234", "5,600,000"], "thousands"),
        (["1.234", "5.678", "9.1"], "plain"),
        (["1,5", "1.234,5", "2.345.678"], "comma"),
        (["1,5|2", "3"], None),
    ],
)
def test_what_may_be_either_of_two_is_no_number(tmp_path: Path, texts: list[str], marks: Marks | None) -> None:
    imported = with_prices(tmp_path, [texts[i % len(texts)] for i in range(1000)])
    found = {feature.name: feature.marks for feature in imported.decision.plan.dense}
    assert found.get("price") == marks


def test_one_stray_comma_does_not_turn_points_into_marks_of_thousands(tmp_path: Path) -> None:
    texts = [f"{x % 9 + 1:.3f}" for x in PRICES]
    texts[3] = "12,5"
    with pytest.raises(ValueError, match="row 3 .*: column 'price' holds numbers, but '12,5' here is no finite one"):
        with_prices(tmp_path, texts)
