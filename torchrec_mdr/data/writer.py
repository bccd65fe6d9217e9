"""Writes the Parquet files of a prepared data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_mdr.storage import path_manager

ROW_GROUP_ROWS = 65_536
_INT32 = np.iinfo(np.int32)


def split_path(folder: str, split: str) -> str:
    """Where `prepare` puts a split: one Parquet file."""
    return f"{folder.rstrip('/')}/{split}.parquet"


def write_split(folder: str, split: str, chunks: Iterable[Mapping[str, Any]]) -> int:
    """Writes one split chunk by chunk, so that it need not fit in memory.

    Args:
        folder (str): folder of the prepared data set.
        split (str): train, validation or test.
        chunks (Iterable[Mapping[str, Any]]): the columns of successive rows, at least one chunk: numpy arrays of one
            dimension, or Arrow arrays for multi-hot features. Floats are stored as float32, integers as int32 where
            they come as int64 and those of the first chunk fit.

    Returns:
        int: number of rows written.

    Raises:
        ValueError: a later chunk has other columns, or values that the first one's types cannot hold.
    """
    rows = 0
    writer: pq.ParquetWriter | None = None
    with path_manager.open(split_path(folder, split), "wb") as file, ExitStack() as stack:
        for chunk in chunks:
            table = pa.table({name: _column(values) for name, values in chunk.items()})
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True)
                stack.enter_context(writer)
            try:
                table = table.cast(writer.schema)
            except (ValueError, pa.ArrowException) as error:
                raise ValueError(
                    f"split {split}: rows from {rows} on do not fit the first ones' columns: {error}; give all chunks "
                    "the same columns and types"
                ) from error
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            rows += table.num_rows
        assert writer is not None, f"no chunk for split {split}"
    return rows


def _column(values: Any) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    array = np.asarray(values)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    elif array.dtype == np.int64 and (not array.size or (array.min() >= _INT32.min and array.max() <= _INT32.max)):
        array = array.astype(np.int32)
    return pa.array(array)
