"""Batches of a prepared data set: one rank's share, shuffled, its rows grouped by domain."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.prefetch import prefetch
from torchrec_mdr.data.read_ahead import ReadAhead
from torchrec_mdr.data.reader import RowGroup, SplitReader
from torchrec_mdr.data.rows import Rows
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.data.shuffle import BatchPlan, Folds, Ints
from torchrec_mdr.ops.groups import BatchDomains

MEMORY_BYTES = 1 << 30  # of the rows that a rank holds at a time
MOST_SHUFFLE_ROWS = 1 << 23


class DomainLoader:
    """Reads one rank's share of a split and yields `DomainBatch`es on the CPU.

    Every selected row comes exactly once an epoch, on one of the ranks; none is dropped. An epoch's batches are of
    equal size up to one row, so 10 rows in batches of at most 4 come as 3, 3, 4. What a global batch holds depends on
    seed and epoch, and not on the number of ranks where that divides 24. All ranks yield the same number of batches; a
    rank's share of a batch holds at least one row in training (`shuffle=True`), but may be empty in evaluation.

    Rows of a share are sorted by their combination of domains, the first division's major, so that
    `BatchDomains.from_sorted` groups them without a permutation. Sorting and gathering run ahead in a thread. A rank's
    rows stay in memory where they take no more than `memory_bytes`, every column in the narrowest type that holds its
    values; otherwise windows of them are read as they are needed, `shuffle_rows` rows over all ranks at a time.

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
        shuffle_rows (int | None): rows over all ranks that are shuffled together; larger splits are shuffled in
            windows. By default 2**23, or as many as take 1 GiB where that is less.
        memory_bytes (int): the most memory a rank's rows may take for the whole run.
        prefetch_batches (int): batches that the thread computes ahead; 0 runs without a thread.
        static_shapes (bool): all batches have exactly batch_size rows, and as many groups, as CUDA graphs want them.
            The rows left at the end of an epoch, fewer than a batch, do not come in it (where rows are read as they
            are needed, they are often the same).
        pin_memory (bool): batches lie in page-locked memory, from which they are copied to a GPU beside other work.
        grouped (bool): whether batches have groups by all domains; sharded banks ask for those of the batch alone.

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
        shuffle_rows: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
        prefetch_batches: int = 4,
        static_shapes: bool = False,
        pin_memory: bool = False,
        grouped: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, not {batch_size}")
        self._reader = SplitReader(folder, schema, split, divisions)
        self._keys = [feature.name for feature in schema.sparse_features]
        self._sizes = [division.num_domains for division in self._reader.divisions]
        self._domains = None if domains is None else np.unique(np.asarray(domains, dtype=np.int64))
        self._folds = folds
        self._prefetch_batches = prefetch_batches
        self._static_shapes = static_shapes
        self._pin_memory = pin_memory
        self._grouped = grouped
        self._check_domains()
        pairs = zip(self._reader.groups, self._masks(), strict=True)
        selected = [group.rows if mask is None else int(mask.sum()) for group, mask in pairs]
        self._ends = np.cumsum(selected, dtype=np.int64)
        self.num_rows = int(self._ends[-1]) if len(self._ends) else 0
        self.num_batches = -(-self.num_rows // batch_size)
        if shuffle:
            if self.num_rows < world_size or batch_size < world_size:
                raise ValueError(
                    f"{folder}: {self.num_rows} selected rows of split '{split}' in batches of {batch_size} cannot "
                    f"give each of {world_size} ranks a row; select more rows, or take fewer ranks or larger batches"
                )
            self.num_batches = min(self.num_batches, self.num_rows // world_size)
        if shuffle_rows is None:
            shuffle_rows = min(MOST_SHUFFLE_ROWS, MEMORY_BYTES * schema.rows[split] // max(self._reader.bytes, 1))
        if static_shapes:
            self.num_batches = self.num_rows // batch_size
            if not self.num_batches or batch_size % world_size:
                raise ValueError(
                    f"static shapes want batches of the same size on each of {world_size} ranks, and at least one of "
                    f"the {self.num_rows} selected rows; {batch_size} is no batch size for that"
                )
        rows = batch_size if static_shapes else None
        self._plan = BatchPlan(self.num_rows, self.num_batches, rank, world_size, shuffle_rows, seed, shuffle, rows)
        self._resident: Rows | None = None
        self._bases: list[int] = []
        share = self.num_rows / max(schema.rows[split], 1) / world_size
        if self._reader.bytes * share <= memory_bytes:
            ranges = [self._plan.lane(lane) for lane in self._plan.lanes]
            with self._reader.read_ahead() as ahead:
                self._announce(ranges, ahead)
                self._resident, self._bases = self._load(ranges, ahead)

    @property
    def num_resident_rows(self) -> int | None:
        """Rows that this rank keeps in memory; None where it reads them as they are needed."""
        return None if self._resident is None else len(self._resident)

    @property
    def resident_bytes(self) -> int:
        """Memory that the rows which this rank keeps take."""
        return 0 if self._resident is None else self._resident.nbytes

    def domain_counts(self, division: str) -> NDArray[np.int64]:
        """Selected rows over all ranks of each domain; reads only the columns it needs.

        Args:
            division (str): any division of the schema.

        Returns:
            NDArray[np.int64]: [num_domains].
        """
        counts = np.zeros(self._reader.schema.division(division).num_domains, dtype=np.int64)
        for ids, mask in zip(self._reader.all_domains(division), self._masks(), strict=True):
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
        if self._pin_memory:
            batches = (batch.pin_memory() for batch in batches)
        return prefetch(batches, self._prefetch_batches) if self._prefetch_batches else batches

    def _batches(self, epoch: int, start: int, stop: int) -> Iterator[DomainBatch]:
        if start >= stop:
            return
        number = self._plan.round_of(start)
        first = self._plan.round_start(number)
        with closing(self._rounds(epoch, number, self._plan.bounds(stop - 1)[1])) as rounds:
            rows, order = next(rounds)
            for batch in range(start, stop):
                begin, end = self._plan.bounds(batch)
                parts, places = [], []
                while end > first + len(order):
                    places.append(order[begin - first :])
                    parts.append(rows.take(places[-1]))
                    begin = first = first + len(order)
                    del rows, order  # before the next ones are read
                    rows, order = next(rounds)
                source, index = rows, order[begin - first : end - first]
                place = np.concatenate([*places, index])
                if parts:
                    parts.append(rows.take(index))
                    source = Rows.cat(parts, rows.form, sum(map(len, parts)))
                    index = np.arange(len(source))
                # numpy sorts 8 and 16 bit keys by radix
                by_domain = np.argsort(source.keys[index], kind="stable")
                taken = source.take(index[by_domain])
                yield self._batch(taken, self._plan.global_rows(batch), place[by_domain])

    def _batch(self, rows: Rows, global_rows: int, places: Ints) -> DomainBatch:
        values, lengths = rows.jagged(self._reader.multi_hot)
        features = KeyedJaggedTensor(keys=self._keys, values=values, lengths=lengths, stride=len(rows))
        return DomainBatch(
            dense_features=torch.from_numpy(rows.dense),
            sparse_features=features.sync(),  # lengths per key, which a GPU would have to be waited for
            labels=torch.from_numpy(rows.labels.astype(np.float32)),
            domains=self._domains_of(torch.from_numpy(rows.domains(self._sizes))),
            global_rows=global_rows,
            row_positions=None if self._resident is None else torch.from_numpy(places.astype(np.int64, copy=False)),
            weights=None if rows.weights is None else torch.from_numpy(rows.weights),
        )

    def _domains_of(self, ids: torch.Tensor) -> BatchDomains:
        if not self._grouped:
            return BatchDomains(ids, (), tuple(self._sizes))
        return BatchDomains.from_sorted(ids, self._sizes, self._static_shapes)

    def _rounds(self, epoch: int, number: int, last: int) -> Generator[tuple[Rows, Ints]]:
        """Rows of each round from one on, and their order in this rank's sequence, up to a place in that.

        While a round is used, what the next one reads comes from the store to this node's disk.
        """
        with self._reader.read_ahead() as ahead:
            windows = self._plan.windows(epoch, number)
            self._announce(windows, ahead)
            for this in range(number, self._plan.num_rounds):
                following = None
                if self._plan.round_start(this + 1) < last and this + 1 < self._plan.num_rounds:
                    following = self._plan.windows(epoch, this + 1)
                    self._announce(following, ahead)
                rows, bases = self._found(windows, ahead)
                yield rows, self._plan.order(epoch, this, bases)
                del rows
                if following is None:
                    return
                windows = following

    def _found(self, windows: list[tuple[int, int]], ahead: ReadAhead) -> tuple[Rows, list[int]]:
        """Rows that hold those of the windows, and where each of these starts in them."""
        if self._resident is None:
            return self._load(windows, ahead)
        lanes = (self._plan.lane(lane) for lane in self._plan.lanes)
        places = zip(self._bases, windows, lanes, strict=True)
        return self._resident, [base + window[0] - lane[0] for base, window, lane in places]

    def _announce(self, ranges: list[tuple[int, int]], ahead: ReadAhead) -> None:
        """Says what :meth:`_load` will read; nothing where the rows are in memory."""
        if self._resident is None:
            ahead.announce(self._reader.groups[number][:2] for number, _ in self._cuts(ranges))

    def _load(self, ranges: list[tuple[int, int]], ahead: ReadAhead) -> tuple[Rows, list[int]]:
        """Reads ascending ranges of selected rows; gives the rows and where each range starts in them."""
        bases = np.cumsum([0, *(stop - start for start, stop in ranges)])
        return Rows.cat(self._ranges(ranges, ahead), self._reader.form, int(bases[-1])), bases[:-1].tolist()

    def _ranges(self, ranges: list[tuple[int, int]], ahead: ReadAhead) -> Iterator[Rows]:
        for number, cuts in self._cuts(ranges):
            group = self._reader.groups[number]
            with ahead.taken(group[:2]) as content:
                rows, natural = self._reader.rows(group, content), self._reader.divisions[0].name
                ids = None if self._domains is None else self._reader.domains(group, natural, content)
            mask = self._mask(group, ids)
            rows = rows if mask is None else rows.take(np.flatnonzero(mask))
            yield from (rows[start:stop] for start, stop in cuts)

    def _cuts(self, ranges: list[tuple[int, int]]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The row groups that hold ranges of selected rows, and what to cut from each."""
        for number in range(len(self._reader.groups)):
            end = int(self._ends[number])
            begin = int(self._ends[number - 1]) if number else 0
            cuts = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in ranges]
            cuts = [(start, stop) for start, stop in cuts if start < stop]
            if cuts:
                yield number, cuts

    def _masks(self) -> Iterator[NDArray[np.bool_] | None]:
        """Which rows are selected, row group by row group; see :meth:`_mask`."""
        natural = self._reader.divisions[0].name
        found = repeat(None) if self._domains is None else self._reader.all_domains(natural)
        for group, ids in zip(self._reader.groups, found, strict=False):
            yield self._mask(group, ids)

    def _mask(self, group: RowGroup, ids: Ints | None) -> NDArray[np.bool_] | None:
        """Which rows of a row group, of these natural domains, are selected; None where all are."""
        mask = None if ids is None or self._domains is None else np.isin(ids, self._domains)
        if self._folds is not None:
            selected = self._folds.selects(np.arange(group.start, group.start + group.rows))
            mask = selected if mask is None else mask & selected
        return mask

    def _check_domains(self) -> None:
        natural = self._reader.divisions[0]
        if self._domains is not None and not (
            len(self._domains) and self._domains[0] >= 0 and self._domains[-1] < natural.num_domains
        ):
            raise ValueError(
                f"domains {self._domains.tolist()} must name at least one of division '{natural.name}', "
                f"0 to {natural.num_domains - 1}"
            )
