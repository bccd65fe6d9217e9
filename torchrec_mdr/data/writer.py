"""Writes the Parquet files of a prepared data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_mdr.storage import open_write

ROW_GROUP_ROWS = 65_536
_INT32 = np.iinfo(np.int32)


def split_path(folder: str, split: str) -> str:
    """Where `prepare` puts a split: one Parquet file."""
    return f"{folder.rstrip('/')}/{split}.parquet"


def arrow_path(folder: str, split: str) -> str:
    """Where a split of record batches lies: one Arrow IPC file."""
    return f"{folder.rstrip('/')}/{split}.arrow"


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
    with open_write(split_path(folder, split)) as file, ExitStack() as stack:
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


def write_batches(folder: str, split: str, batches: Iterable[pa.RecordBatch]) -> int:
    """Writes one split from record batches, as Arrow IPC; one batch at a time is in memory.

    Args:
        folder (str): folder of the data set.
        split (str): train, validation or test.
        batches (Iterable[pa.RecordBatch]): successive rows, with the columns of the schema; at least one batch.

    Returns:
        int: number of rows written.

    Raises:
        ValueError: there is no batch, or a later one has other columns or types than the first.
    """
    rows = 0
    writer: pa.ipc.RecordBatchFileWriter | None = None
    with open_write(arrow_path(folder, split)) as file, ExitStack() as stack:
        for batch in _even(batches):
            if writer is None:
                writer = stack.enter_context(pa.ipc.new_file(file, batch.schema))
                first = batch.schema
            if not batch.schema.equals(first):
                raise ValueError(
                    f"split {split}: the record batch with row {rows} has the columns {_shown(batch.schema)}, the "
                    f"first one {_shown(first)}; give all batches the same columns and types"
                )
            writer.write_table(batch)
            rows += batch.num_rows
    if writer is None:
        raise ValueError(f"split {split} has no record batch, not even one without rows, which would tell its columns")
    return rows


def _even(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP_ROWS rows, where types do not change in between."""
    waiting: list[pa.RecordBatch] = []
    rows = given = 0
    for batch in batches:
        if waiting and not batch.schema.equals(waiting[0].schema):
            yield pa.Table.from_batches(waiting).combine_chunks()
            waiting, rows = [], 0
        waiting.append(batch)
        rows += batch.num_rows
        given += batch.num_rows
        while rows >= ROW_GROUP_ROWS:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP_ROWS).combine_chunks()
            waiting = table.slice(ROW_GROUP_ROWS).to_batches()
            rows -= ROW_GROUP_ROWS
    if waiting and (rows or not given):
        yield pa.Table.from_batches(waiting).combine_chunks()


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
