"""Rows that come as Arrow record batches, made into a data set that can be trained on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

import pyarrow as pa

from torchrec_mdr.data.cache import cache_root
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.data.writer import write_batches
from torchrec_mdr.storage import is_store, make_folder, scratch_folder


class RecordBatches:
    """A data set whose rows come as record batches, from wherever they are made or kept.

    Batches are read once, one at a time, and kept in a temporary folder as Arrow IPC: shuffling, epochs, several
    ranks and resuming need rows that can be read again, and the batches in memory may be too many. What is trained on
    them is bitwise what is trained on the same rows in Parquet.

    Args:
        schema (Schema): the columns, see :class:`~torchrec_mdr.data.schema.Schema`; its numbers of rows do not matter.
        batches (Mapping[str, Iterable[pa.RecordBatch]]): of `train`, `validation` and `test`; at least one a split.
        folder (str | None): where the temporary folder goes, by default the cache ($MDR_CACHE), or this node's
            disk where that is in a store.

    Raises:
        ValueError: a split is missing, has no batch, or batches whose columns differ.

    Example::

        >>> from torchrec_mdr.data.loader import DomainLoader
        >>> from torchrec_mdr.data.schema import Division, SparseFeature
        >>> schema = Schema("mine", "clicked", (SparseFeature("item", 9),), (), (Division("shop", 2),), {})
        >>> rows = pa.RecordBatch.from_pydict({"clicked": [1, 0], "item": [3, 8], "domain_shop": [0, 1]})
        >>> with RecordBatches(schema, {split: iter([rows, rows]) for split in SPLITS}) as data:
        ...     loader = DomainLoader(data.folder, data.schema, "train", ["shop"], batch_size=4, shuffle=True)
        ...     [batch.global_rows for batch in loader.batches(epoch=0)]
        [4]
    """

    def __init__(
        self, schema: Schema, batches: Mapping[str, Iterable[pa.RecordBatch]], folder: str | None = None
    ) -> None:
        for split in SPLITS:
            if split not in batches:
                raise ValueError(f"there are no record batches for split '{split}'; give some for {', '.join(SPLITS)}")
        root = folder or cache_root()
        make_folder(root, "the folder of record batches")
        self._temporary = ExitStack()
        local = scratch_folder() if is_store(root) else tempfile.TemporaryDirectory(prefix="record-batches-", dir=root)
        self.folder = os.path.abspath(self._temporary.enter_context(local))
        try:
            rows = {split: write_batches(self.folder, split, batches[split]) for split in SPLITS}
            self.schema = replace(schema, rows=rows)
            self.schema.save(self.folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes the temporary folder."""
        self._temporary.close()

    def __enter__(self) -> RecordBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
