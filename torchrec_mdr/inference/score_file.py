"""Scored rows in a file, Parquet or CSV, that is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import ExitStack
from types import TracebackType
from typing import Any, BinaryIO

import polars as pl
import pyarrow.parquet as pq

from torchrec_mdr.storage import is_store, isdir, located, make_folder, open_write, remove, write_bytes

SUFFIXES = (".parquet", ".csv")


class ScoreFile:
    """Takes frames of rows, one after another, and gets its name when all are written.

    Args:
        path (str): ends with .parquet or .csv; on a disk or in an object store.

    Raises:
        ValueError: another ending, or a folder that cannot be written to.

    Example::

        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/scores.csv"
        >>> with ScoreFile(path) as file:
        ...     file.write(pl.DataFrame({"user": [7], "score": [0.5]}))
        ...     file.write(pl.DataFrame({"user": [8], "score": [0.25]}))
        >>> print(open(path).read())
        user,score
        7,0.5
        8,0.25
        <BLANKLINE>
    """

    def __init__(self, path: str) -> None:
        self.path = located(path)
        self.kind = os.path.splitext(self.path)[1].lower()
        if self.kind not in SUFFIXES:
            raise ValueError(f"--output {path} must end with {' or '.join(SUFFIXES)}, which says what is written")
        if isdir(self.path):
            raise ValueError(f"--output {path} is a folder; name a file")
        make_folder(os.path.dirname(self.path) or ".", "the folder of --output")
        self._temporary = f"{self.path}.writing"
        if is_store(self.path):  # which says now, and not after all the work, whether it takes files
            write_bytes(self._temporary, b"")
            remove(self._temporary)
        self._opened = ExitStack()
        self._file: BinaryIO | None = None
        self._parquet: Any = None

    def write(self, rows: pl.DataFrame) -> None:
        """Adds rows; the first ones say which columns there are."""
        if self._file is None:
            self._file = self._opened.enter_context(open_write(self.path))
            if self.kind == ".parquet":
                self._parquet = pq.ParquetWriter(self._file, rows.to_arrow().schema, compression="zstd")
            else:
                rows.head(0).write_csv(self._file)
        if self._parquet is not None:
            self._parquet.write_table(rows.to_arrow().cast(self._parquet.schema))
        else:
            rows.write_csv(self._file, include_header=False)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if self._parquet is not None:
            self._parquet.close()
        try:
            self._opened.__exit__(kind, error, trace)
        finally:
            if not is_store(self.path):
                remove(self._temporary)
