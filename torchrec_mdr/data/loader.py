"""Batches of a prepared data set: one rank's share, shuffled, its rows grouped by domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.prefetch import prefetch
from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.rows import Rows
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.data.shuffle import BatchPlan, Folds, Ints
from torchrec_mdr.ops.groups import BatchDomains


class DomainLoader:
    """Reads one rank's share of a split and yields `DomainBatch`es on the CPU.

    Every selected row comes exactly once an epoch, on one of the ranks; none is dropped. An epoch's batches are of
    equal size up to one row, so 10 rows in batches of at most 4 come as 3, 3, 4. What a global batch holds depends on
    seed and epoch, and not on the number of ranks where that divides 24. All ranks yield the same number of batches; a
    rank's share of a batch holds at least one row in training (`shuffle=True`), but may be empty in evaluation.

    Rows of a share are sorted by their combination of domains, the first division's major, so that
    `BatchDomains.from_sorted` groups them without a permutation. Sorting and gathering run ahead in a thread. A rank's
    rows stay in memory where they take no more than `memory_bytes`; otherwise windows of them are read as they are
    needed, `shuffle_rows` rows over all ranks at a time.

    Args:
        folder (str): the prepared data set.
        schema (Schema): its schema.
        split (str): train, validation or test.
        divisions (Sequence[str]): the run's divisions, the natural one first.
        batch_size (int): rows of a batch over all ranks, at most.
        rank (int): this rank.
        world_size (int): number of ranks.
        seed (int): of the shuffle.
        shuffle (bool): True for training; False keeps an order that is the same in every epoch.
        domains (Sequence[int] | None): select only rows of these domains of the first division.
        folds (Folds | None): select only rows of these folds.
        shuffle_rows (int): rows over all ranks that are shuffled together; larger splits are shuffled in windows.
        memory_bytes (int): the most memory a rank's rows may take for the whole run.
        prefetch_batches (int): batches that the thread computes ahead; 0 runs without a thread.

    Raises:
        ValueError: an unreadable file; a column that is missing, of a wrong type or with values out of range; an
            unknown division or domain; in training, too few selected rows or too small a batch size for the ranks.

    Example::

        >>> import tempfile
        >>> from torchrec_mdr.data.cache import prepared_folder
        >>> from torchrec_mdr.data.datasets.synthetic import Synthetic
        >>> folder = prepared_folder(Synthetic(rows=1000, num_domains=5), "synthetic", cache_dir=tempfile.mkdtemp())
        >>> loader = DomainLoader(folder, Schema.load(folder), "train", ["scenario", "segment"], 256, shuffle=True)
        >>> loader.num_rows, loader.num_batches
        (800, 4)
        >>> batch = next(loader.batches(epoch=0))
        >>> batch.domains.ids.shape, batch.global_rows
        (torch.Size([200, 2]), 200)
    """

    def __init__(
        self,
        folder: str,
        schema: Schema,
        split: str,
        divisions: Sequence[str],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        domains: Sequence[int] | None = None,
        folds: Folds | None = None,
        shuffle_rows: int = 1 << 23,
        memory_bytes: int = 2 << 30,
        prefetch_batches: int = 4,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, not {batch_size}")
        self._reader = SplitReader(folder, schema, split, divisions)
        self._keys = [feature.name for feature in schema.sparse_features]
        self._sizes = [division.num_domains for division in self._reader.divisions]
        self._domains = None if domains is None else np.unique(np.asarray(domains, dtype=np.int64))
        self._folds = folds
        self._prefetch_batches = prefetch_batches
        self._check_domains()
        self._ends = np.cumsum([self._selected(number) for number in range(len(self._reader.groups))], dtype=np.int64)
        self.num_rows = int(self._ends[-1]) if len(self._ends) else 0
        self.num_batches = -(-self.num_rows // batch_size)
        if shuffle:
            if self.num_rows < world_size or batch_size < world_size:
                raise ValueError(
                    f"{folder}: {self.num_rows} selected rows of split '{split}' in batches of {batch_size} cannot "
                    f"give each of {world_size} ranks a row; select more rows, or take fewer ranks or larger batches"
                )
            self.num_batches = min(self.num_batches, self.num_rows // world_size)
        self._plan = BatchPlan(self.num_rows, self.num_batches, rank, world_size, shuffle_rows, seed, shuffle)
        self._resident: Rows | None = None
        self._bases: list[int] = []
        share = self.num_rows / max(schema.rows[split], 1) / world_size
        if self._reader.bytes * share <= memory_bytes:
            self._resident, self._bases = self._load([self._plan.lane(lane) for lane in self._plan.lanes])

    @property
    def num_resident_rows(self) -> int | None:
        """Rows that this rank keeps in memory; None where it reads them as they are needed."""
        return None if self._resident is None else len(self._resident)

    def domain_counts(self, division: str) -> NDArray[np.int64]:
        """Selected rows over all ranks of each domain; reads only the columns it needs.

        Args:
            division (str): any division of the schema.

        Returns:
            NDArray[np.int64]: [num_domains].
        """
        counts = np.zeros(self._reader.schema.division(division).num_domains, dtype=np.int64)
        for number, group in enumerate(self._reader.groups):
            ids, mask = self._reader.domains(group, division), self._mask(number)
            counts += np.bincount(ids if mask is None else ids[mask], minlength=len(counts))
        return counts

    def batches(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[DomainBatch]:
        """This rank's share of the global batches [start, stop) of an epoch.

        The same seed, epoch and range give the same batches; batches before `start` cost nothing.

        Args:
            epoch (int): epoch, from 0.
            start (int): first batch.
            stop (int | None): end of the batches; None takes all.

        Returns:
            Iterator[DomainBatch]: the batches; closing it ends its thread.
        """
        last = self.num_batches if stop is None else min(stop, self.num_batches)
        batches = self._batches(epoch, start, last)
        return prefetch(batches, self._prefetch_batches) if self._prefetch_batches else batches

    def _batches(self, epoch: int, start: int, stop: int) -> Iterator[DomainBatch]:
        if start >= stop:
            return
        number = self._plan.round_of(start)
        first = self._plan.round_start(number)
        rows, order = self._round(epoch, number)
        for batch in range(start, stop):
            begin, end = self._plan.bounds(batch)
            parts, places = [], []
            while end > first + len(order):
                places.append(order[begin - first :])
                parts.append(rows.take(places[-1]))
                begin = first = first + len(order)
                number += 1
                rows, order = self._round(epoch, number)
            source, index = rows, order[begin - first : end - first]
            place = np.concatenate([*places, index])
            if parts:
                source = Rows.cat([*parts, rows.take(index)])
                index = np.arange(len(source))
            # numpy sorts 8 and 16 bit keys by radix
            by_domain = np.argsort(source.keys[index], kind="stable")
            taken = source.take(index[by_domain])
            yield self._batch(taken, self._plan.global_rows(batch), place[by_domain])

    def _batch(self, rows: Rows, global_rows: int, places: Ints) -> DomainBatch:
        values, lengths = rows.jagged(self._reader.multi_hot)
        return DomainBatch(
            dense_features=torch.from_numpy(rows.dense),
            sparse_features=KeyedJaggedTensor(keys=self._keys, values=values, lengths=lengths, stride=len(rows)),
            labels=torch.from_numpy(rows.labels),
            domains=BatchDomains.from_sorted(torch.from_numpy(rows.domains.astype(np.int64)), self._sizes),
            global_rows=global_rows,
            row_positions=None if self._resident is None else torch.from_numpy(places.astype(np.int64, copy=False)),
        )

    def _round(self, epoch: int, number: int) -> tuple[Rows, Ints]:
        """Rows of a round, and their order in this rank's sequence."""
        windows = self._plan.windows(epoch, number)
        if self._resident is None:
            rows, bases = self._load(windows)
        else:
            rows = self._resident
            lanes = (self._plan.lane(lane) for lane in self._plan.lanes)
            bases = [base + window[0] - lane[0] for base, window, lane in zip(self._bases, windows, lanes, strict=True)]
        return rows, self._plan.order(epoch, number, bases)

    def _load(self, ranges: list[tuple[int, int]]) -> tuple[Rows, list[int]]:
        """Reads ascending ranges of selected rows; gives the rows and where each range starts in them."""
        parts = [self._reader.empty()]
        for number, group in enumerate(self._reader.groups):
            end = int(self._ends[number])
            begin = int(self._ends[number - 1]) if number else 0
            cuts = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in ranges]
            cuts = [(start, stop) for start, stop in cuts if start < stop]
            if cuts:
                rows, mask = self._reader.rows(group), self._mask(number)
                rows = rows if mask is None else rows.take(np.flatnonzero(mask))
                parts.extend(rows[start:stop] for start, stop in cuts)
        bases = np.cumsum([0, *(stop - start for start, stop in ranges)])[:-1]
        return Rows.cat(parts), bases.tolist()

    def _mask(self, number: int) -> NDArray[np.bool_] | None:
        """Which rows of a row group are selected; None where all are."""
        group = self._reader.groups[number]
        mask = None
        if self._domains is not None:
            mask = np.isin(self._reader.domains(group, self._reader.divisions[0].name), self._domains)
        if self._folds is not None:
            selected = self._folds.selects(np.arange(group.start, group.start + group.rows))
            mask = selected if mask is None else mask & selected
        return mask

    def _selected(self, number: int) -> int:
        mask = self._mask(number)
        return self._reader.groups[number].rows if mask is None else int(mask.sum())

    def _check_domains(self) -> None:
        natural = self._reader.divisions[0]
        if self._domains is not None and not (
            len(self._domains) and self._domains[0] >= 0 and self._domains[-1] < natural.num_domains
        ):
            raise ValueError(
                f"domains {self._domains.tolist()} must name at least one of division '{natural.name}', "
                f"0 to {natural.num_domains - 1}"
            )
