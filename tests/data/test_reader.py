from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import own, tiny
from torchrec_mdr.data.checks import check_splits, check_values
from torchrec_mdr.data.files import check_types
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.schema import Schema, SparseFeature
from torchrec_mdr.data.split_files import open_split


def load(folder: str, schema: Schema) -> DomainLoader:
    return DomainLoader(folder, schema, "train", ["scenario", "segment"], 32)


def set_at(values: np.ndarray, row: int, value: Any) -> np.ndarray:
    changed = values.copy()
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("item", 50, r"column 'item', row 130 \(from 0\): 50 is outside its embedding table, \[0, 50\); correct"),
        ("item", -1, r"column 'item', row 130 .*: -1 is outside its embedding table"),
        ("domain_segment", 3, r"column 'domain_segment', row 130 .*: 3 is outside its division, \[0, 3\)"),
        ("label", 0.5, r"column 'label', row 130 .*: 0.5 is no label, which is 0 or 1"),
        ("label", float("nan"), r"column 'label', row 130 .*: nan is no finite number"),
        ("price", float("nan"), r"column 'price', row 130 .*: nan is no finite number"),
        ("age", float("inf"), r"column 'age', row 130 .*: inf is no finite number"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, column: str, value: float, message: str) -> None:
    table = tiny.columns(200)
    table[column] = set_at(table[column], 130, value)
    with pytest.raises(ValueError, match=r"train\.parquet, " + message):
        load(*tiny.write(tmp_path / "bad", table))


def test_a_row_is_counted_within_its_file(tmp_path: Path) -> None:
    table = tiny.columns(200)
    table["item"] = set_at(table["item"], 130, 99)
    with pytest.raises(ValueError, match=r"part-00001\.parquet, column 'item', row 30 \(from 0\)"):
        load(*tiny.write(tmp_path / "bad", table, parts=2, row_group_size=8))


def test_an_id_outside_its_table_in_a_list_is_named(tmp_path: Path) -> None:
    table = tiny.columns(100, multi_hot=True)
    lists = table["tags"].to_pylist()
    lists[70] = [1, 9]
    table["tags"] = pa.array(lists, pa.list_(pa.int32()))
    with pytest.raises(ValueError, match=r"column 'tags', row 70 .*: \[1, 9\] holds an id outside .* \[0, 9\)"):
        load(*tiny.write(tmp_path / "bad", table, multi_hot=True))


@pytest.mark.parametrize("column", ["item", "price", "domain_scenario", "label"])
def test_a_missing_value_is_named(tmp_path: Path, column: str) -> None:
    table = tiny.columns(100)
    values = table[column].tolist()
    values[77] = None
    table[column] = pa.array(values, pa.array(table[column]).type)
    with pytest.raises(ValueError, match=f"column '{column}', row 77 .*: the value is missing"):
        load(*tiny.write(tmp_path / "bad", table))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "item",
            ["a"] * 10,
            "column 'item' holds string, not integers; correct it or schema.json",
        ),
        ("item", np.zeros(10), "column 'item' holds double, not integers"),
        ("price", ["a"] * 10, "column 'price' holds string, not numbers"),
        ("domain_scenario", np.zeros(10), "column 'domain_scenario' holds double, not integers"),
        ("label", [[1]] * 10, "column 'label' holds list<.*>, not numbers"),
    ],
)
def test_a_column_of_a_wrong_type_is_named(tmp_path: Path, column: str, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"train\.parquet: " + message):
        load(*tiny.write(tmp_path / "bad", tiny.columns(10) | {column: values}))


@pytest.mark.parametrize("column", ["label", "item", "price", "domain_segment"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    table = tiny.columns(10)
    del table[column]
    with pytest.raises(ValueError, match=rf"train\.parquet has no column '{column}', which schema.json names"):
        load(*tiny.write(tmp_path / "bad", table))


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([1.0]), pa.array([2])], names=["item", "label", "item"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet has the column 'item' twice; take one out"):
        check_types(open_split(str(tmp_path), "train"), {"label": "numbers", "item": "integers"}, "correct it")


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(10))
    with pytest.raises(ValueError, match=r"data has neither test\.parquet nor Parquet files in test/; put"):
        SplitReader(folder, schema, "test", ["scenario"])
    (tmp_path / "data" / "test").mkdir()
    with pytest.raises(ValueError, match="has neither test"):
        SplitReader(folder, schema, "test", ["scenario"])


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(100))
    path = tmp_path / "data" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.parquet is no readable Parquet file \(.*\); write it anew") as caught:
        load(folder, schema)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_are_noticed(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(100))
    path = tmp_path / "data" / "train.parquet"
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.parquet is corrupt in row group 0 \(.*\); write it anew") as caught:
        load(folder, schema)
    assert "\n" not in str(caught.value)


def test_rows_that_the_schema_does_not_count_are_refused(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(100))
    with pytest.raises(ValueError, match=r"train\.parquet: the split has 100 rows, schema\.json says 90"):
        load(folder, replace(schema, rows={**schema.rows, "train": 90}))


def test_an_unknown_division_is_named(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(10))
    with pytest.raises(ValueError, match="data set 'tiny' has no division 'age'; it has scenario, segment"):
        SplitReader(folder, schema, "train", ["age"])


def test_ids_beyond_32_bits_survive(tmp_path: Path) -> None:
    table = tiny.columns(10)
    table["item"] = np.full(10, 2**40)
    folder, schema = tiny.write(tmp_path / "data", table)
    row, item = schema.sparse_features
    reader = SplitReader(
        folder, replace(schema, sparse_features=(row, SparseFeature("item", 2**41))), "train", ["segment"]
    )
    assert reader.rows(reader.groups[0]).ids(1).tolist() == [2**40] * 10


def test_bytes_are_about_what_the_rows_take(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(5000, multi_hot=True), multi_hot=True)
    reader = SplitReader(folder, schema, "train", ["scenario"])
    taken = sum(reader.rows(group).nbytes for group in reader.groups)
    assert 0.8 * taken < reader.bytes < 1.25 * taken


def test_a_split_may_be_a_folder_as_spark_writes_it(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "data", tiny.columns(100), parts=2)
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "train.parquet")
    (tmp_path / "data" / "train.parquet" / "_SUCCESS").touch()
    assert sum(group.rows for group in SplitReader(folder, schema, "train", ["scenario"]).groups) == 100


def test_lists_are_lists_in_column_and_schema(tmp_path: Path) -> None:
    folder, schema = tiny.write(tmp_path / "lists", tiny.columns(10, multi_hot=True), multi_hot=True)
    features = tuple(replace(feature, multi_hot=False) for feature in schema.sparse_features)
    with pytest.raises(ValueError, match="column 'tags' holds lists, but multi_hot is false in schema.json; correct"):
        SplitReader(folder, replace(schema, sparse_features=features), "train", ["scenario"])
    folder, schema = tiny.write(tmp_path / "single", tiny.columns(10))
    features = tuple(replace(feature, multi_hot=True) for feature in schema.sparse_features)
    with pytest.raises(ValueError, match="column 'row' holds single ids, but multi_hot is true"):
        SplitReader(folder, replace(schema, sparse_features=features), "train", ["scenario"])


def test_a_raw_time_is_no_dense_feature(tmp_path: Path) -> None:
    table = tiny.columns(10) | {"age": np.arange(10) + 1.7e9}
    folder, schema = tiny.write(tmp_path / "raw", table)
    with pytest.raises(ValueError, match=r"train\.parquet: column 'age' holds values of up to 1.7e\+09.*scale it"):
        check_splits(folder, replace(schema, rows={**schema.rows, "validation": 1, "test": 1}), ["scenario"])


def test_bad_values_of_a_split_are_found_before_training(tmp_path: Path) -> None:
    content = own.write(tmp_path)
    path = tmp_path / "test.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("item")
    ids = table["item"].to_pylist()
    ids[7] = 99
    pq.write_table(table.set_column(place, "item", pa.array(ids, pa.int32())), path)
    with pytest.raises(ValueError, match=r"test\.parquet, column 'item', row 7 .*99 is outside its embedding table"):
        check_values(str(tmp_path), Schema.load(str(tmp_path)), [content["divisions"][0]["name"]])
