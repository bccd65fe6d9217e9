from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_mdr.data.writer import write_split


def written(folder: Path, *chunks: Any) -> pa.ChunkedArray:
    assert write_split(str(folder), "train", [{"x": chunk} for chunk in chunks]) == sum(map(len, chunks))
    return pq.read_table(folder / "train.parquet")["x"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([-(2**40), -5, 7], pa.int64()),
        ([2**40, -5, 7], pa.int64()),
        ([-(2**31), 2**31 - 1], pa.int32()),
        ([-(2**31) - 1, 0], pa.int64()),
        ([0, 2**31], pa.int64()),
        ([], pa.int32()),
    ],
)
def test_whole_numbers_are_stored_narrow_only_where_both_ends_fit(tmp_path: Path, values: list[int], kind: Any) -> None:
    column = written(tmp_path, np.array(values, dtype=np.int64))
    assert column.type == kind and column.to_pylist() == values


def test_floats_are_stored_single_and_lists_as_they_are(tmp_path: Path) -> None:
    assert written(tmp_path, np.array([0.5, 2.0])).type == pa.float32()
    bags = pa.array([[1, 2], []], pa.list_(pa.int64()))
    assert written(tmp_path, bags).to_pylist() == [[1, 2], []]


def test_later_chunks_take_the_first_ones_types(tmp_path: Path) -> None:
    column = written(tmp_path, np.array([2**40]), np.array([3, -4]))
    assert column.type == pa.int64() and column.to_pylist() == [2**40, 3, -4]


@pytest.mark.parametrize("later", [{"x": np.array([2**40])}, {"y": np.array([1])}])
def test_a_chunk_that_does_not_fit_is_refused(tmp_path: Path, later: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="split train: rows from 2 on do not fit the first ones' columns: "):
        write_split(str(tmp_path), "train", [{"x": np.array([1, 2])}, later])
