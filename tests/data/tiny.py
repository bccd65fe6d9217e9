"""Small prepared data sets whose rows can be recognised in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_mdr.data.schema import SPLITS, Division, Schema, SparseFeature, domain_column

SIZES = {"scenario": 4, "segment": 3}


def columns(rows: int, multi_hot: bool = False) -> dict[str, Any]:
    """Random columns; the sparse feature `row` is the row's number."""
    rng = np.random.default_rng(rows)
    table: dict[str, Any] = {
        "label": rng.integers(0, 2, rows).astype(np.float32),
        "row": np.arange(rows, dtype=np.int32),
        "item": rng.integers(0, 50, rows).astype(np.int64),
        "price": rng.standard_normal(rows).astype(np.float32),
        "age": rng.random(rows),
    }
    if multi_hot:
        lengths = rng.integers(0, 4, rows)
        table["tags"] = pa.array([rng.integers(0, 9, length).tolist() for length in lengths], pa.list_(pa.int32()))
    for name, size in SIZES.items():
        table[domain_column(name)] = rng.integers(0, size, rows).astype(np.int32)
    return table


def schema(rows: int, multi_hot: bool = False) -> Schema:
    """The schema of `columns`."""
    tags = (SparseFeature("tags", 9, multi_hot=True, pooling="sum"),) if multi_hot else ()
    return Schema(
        dataset="tiny",
        label="label",
        sparse_features=(SparseFeature("row", max(rows, 1)), *tags, SparseFeature("item", 50)),
        dense_features=("price", "age"),
        divisions=tuple(Division(name, size) for name, size in SIZES.items()),
        rows={split: rows if split == "train" else 0 for split in SPLITS},
    )


def write(
    folder: Path, table: dict[str, Any], multi_hot: bool = False, parts: int = 1, row_group_size: int = 64
) -> tuple[str, Schema]:
    """Writes `train` with these columns, in one file or several, and gives the folder and its schema."""
    arrow = pa.table(table)
    folder.mkdir(exist_ok=True)
    if parts == 1:
        pq.write_table(arrow, folder / "train.parquet", row_group_size=row_group_size, write_page_checksum=True)
    else:
        (folder / "train").mkdir()
        cuts = [part * arrow.num_rows // parts for part in range(parts + 1)]
        for part, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            path = folder / "train" / f"part-{part:05d}.parquet"
            pq.write_table(arrow.slice(start, stop - start), path, row_group_size=row_group_size)
    made = schema(arrow.num_rows, multi_hot)
    made.save(str(folder))
    return str(folder), made
