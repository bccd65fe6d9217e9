"""A data set's rows laid aside as Parquet: read from their files once, and counted in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_mdr.data.features import keys
from torchrec_mdr.data.schema import SPLITS
from torchrec_mdr.data.writer import ROW_GROUP_ROWS

_CHUNK_ROWS = 4 * ROW_GROUP_ROWS
COUNTED_AT_ONCE = 2_000_000  # different values, about


@dataclass(frozen=True)
class StagedRows:
    """Rows of the three splits, a Parquet file each.

    Args:
        folder (str): where they lie.
        rows (Mapping[str, int]): rows of each split.
    """

    folder: str
    rows: Mapping[str, int]

    @staticmethod
    def write(
        folder: str, splits: Mapping[str, pl.LazyFrame], columns: Sequence[str], texts: Sequence[str]
    ) -> StagedRows:
        """Lays rows aside.

        Args:
            folder (str): a new folder.
            splits (Mapping[str, pl.LazyFrame]): the rows.
            columns (Sequence[str]): those to take.
            texts (Sequence[str]): those among them that are values to be counted.

        Raises:
            ValueError: a split has no rows.
        """
        os.mkdir(folder)
        kept = [keys.key(name, pl.String(), "text").alias(name) for name in texts]
        kept = [pl.col(name) for name in columns if name not in texts] + kept
        rows = {}
        for split in SPLITS:
            frame = splits[split].with_columns(pl.col(name).cast(pl.String) for name in texts).select(kept)
            writer = None
            rows[split] = 0
            for batch in _batches(frame, f"reading {split}"):
                table = batch.to_arrow(compat_level=pl.CompatLevel.oldest())
                if writer is None:
                    writer = pq.ParquetWriter(f"{folder}/{split}.parquet", table.schema)
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
                rows[split] += batch.height
            if writer is not None:
                writer.close()
            if not rows[split]:
                what = "training row" if split == "train" else f"row for split {split}"
                raise ValueError(f"the files give no {what}; restore the original files")
        return StagedRows(folder, rows)

    def batches(self, split: str, title: str, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """A split's rows in their order, some at a time."""
        rows = self._scan(split)
        yield from _batches(rows if columns is None else rows.select(columns), title)

    def counts(self, name: str, least: int) -> pl.DataFrame:
        """How many training rows have each value of a column.

        Values are counted in parts, by their hashes, so that memory follows the values that are kept, and not all.

        Args:
            name (str): a column of texts.
            least (int): values in fewer rows are left out.

        Returns:
            pl.DataFrame: `value`, String, null where it is missing, and `count`, Int64; in no order.
        """
        column = self._scan("train").select(pl.col(name).alias("value"))
        distinct = column.select(pl.col("value").approx_n_unique()).collect(engine="streaming").item()
        parts = distinct // COUNTED_AT_ONCE + 1
        found = []
        for part in range(parts):
            own = column if parts == 1 else column.filter(pl.col("value").hash() % parts == part)
            counts = own.group_by("value").agg(pl.len().cast(pl.Int64).alias("count"))
            found.append(counts.filter(pl.col("count") >= least).collect(engine="streaming"))
        return pl.concat(found)

    def ranges(self, names: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
        """The smallest and the largest number of columns in training rows; None where there is no number."""
        ends = [end for name in names for end in (pl.col(name).min().alias(f"<{name}"), pl.col(name).max().alias(name))]
        found = self._scan("train").select(ends).collect(engine="streaming").row(0, named=True)
        return {name: (found[f"<{name}"], found[name]) for name in names}

    def _scan(self, split: str) -> pl.LazyFrame:
        return pl.scan_parquet(f"{self.folder}/{split}.parquet", glob=False)


def _batches(rows: pl.LazyFrame, title: str) -> Iterator[pl.DataFrame]:
    with tqdm(desc=title, unit=" rows", unit_scale=True, delay=1) as progress:
        for batch in rows.collect_batches(chunk_size=_CHUNK_ROWS, maintain_order=True, engine="streaming"):
            yield from batch.iter_slices(_CHUNK_ROWS)
            progress.update(batch.height)
