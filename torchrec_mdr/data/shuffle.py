"""Which rows each batch takes: arithmetic on row numbers, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# a multiple of 1, 2, 3, 4, 6, 8, 12 and 24 ranks, for which batches are the same
NUM_LANES = 24

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Folds:
    """A selection of rows by a seeded hash of their position in the split.

    Args:
        num_folds (int): every row is in exactly one of them.
        keep (tuple[int, ...]): the folds whose rows are selected.
        seed (int): another seed gives other folds.

    Raises:
        ValueError: no fold is kept, or one is outside [0, num_folds).

    Example::

        >>> held_out, others = Folds(20, (0, 1, 2)), Folds(20, tuple(range(3, 20)))
        >>> positions = np.arange(1000)
        >>> bool((held_out.selects(positions) ^ others.selects(positions)).all())
        True
    """

    num_folds: int
    keep: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.keep or min(self.keep) < 0 or max(self.keep) >= self.num_folds:
            raise ValueError(f"folds {list(self.keep)} must name at least one of 0 to {self.num_folds - 1}")

    def selects(self, positions: Ints) -> NDArray[np.bool_]:
        """Whether each row, given by its position in the split, is selected."""
        # splitmix64: neighbouring positions land in unrelated folds
        x = positions.astype(np.uint64) + np.uint64((self.seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        fold = (x ^ (x >> np.uint64(31))) % np.uint64(self.num_folds)
        return np.isin(fold, np.array(self.keep, dtype=np.uint64))


@dataclass(frozen=True)
class BatchPlan:
    """Deals the selected rows of a split to batches and ranks.

    The rows are cut in contiguous lanes of equal length. The sequence of all rows takes one row of each lane in turn,
    and a batch is the next stretch of it; rank r serves lanes r, r + world_size, ... So what a global batch holds does
    not depend on the number of ranks (where it divides 24), a rank needs its own lanes only, and all ranks have the
    same number of batches, with shares that differ by one row at most. Batches are of equal size, up to one row.

    Within a lane rows are shuffled by (seed, epoch, lane): all of them where the split has no more than `shuffle_rows`,
    otherwise window by window, the windows in random order too (but for the last, shorter one).

    Args:
        num_rows (int): selected rows over all ranks.
        num_batches (int): batches of an epoch.
        rank (int): this rank.
        world_size (int): number of ranks.
        shuffle_rows (int): rows over all lanes that are shuffled, and held in memory, together.
        seed (int): of the shuffle.
        shuffle (bool): False keeps the rows' order in each lane.
        batch_rows (int | None): of every batch, a multiple of the ranks: what is left of an epoch's rows after
            num_batches of them does not come. Rows are shared evenly, and all come, where left out.

    Example::

        >>> plan = BatchPlan(num_rows=1000, num_batches=8, rank=0, world_size=2)
        >>> plan.num_rounds, plan.bounds(0), plan.global_rows(0)
        (1, (0, 63), 125)
    """

    num_rows: int
    num_batches: int
    rank: int = 0
    world_size: int = 1
    shuffle_rows: int = 1 << 23
    seed: int = 0
    shuffle: bool = True
    batch_rows: int | None = None

    @property
    def num_lanes(self) -> int:
        """Number of lanes over all ranks."""
        return self.world_size * -(-NUM_LANES // self.world_size)

    @property
    def lanes(self) -> range:
        """The lanes of this rank."""
        return range(self.rank, self.num_lanes, self.world_size)

    def lane(self, lane: int) -> tuple[int, int]:
        """The selected rows [start, stop) of a lane."""
        size, longer = divmod(self.num_rows, self.num_lanes)
        start = lane * size + min(lane, longer)
        return start, start + size + (lane < longer)

    @property
    def window(self) -> int:
        """Rows of a lane in one round."""
        return max(self.shuffle_rows // self.num_lanes, 1)

    @property
    def num_rounds(self) -> int:
        """Rounds of an epoch: in each, every lane serves one window."""
        whole = self.num_rows // self.num_lanes // self.window
        return whole + (self.num_rows > whole * self.window * self.num_lanes)

    def round_start(self, number: int) -> int:
        """Place of a round's first row in this rank's sequence."""
        return number * self.window * len(self.lanes)

    def round_of(self, batch: int) -> int:
        """The round that holds this rank's first row of a batch."""
        return min(self.bounds(batch)[0] // (self.window * len(self.lanes)), self.num_rounds - 1)

    def global_rows(self, batch: int) -> int:
        """Rows of a batch over all ranks."""
        return self._boundary(batch + 1) - self._boundary(batch)

    def bounds(self, batch: int) -> tuple[int, int]:
        """Places [start, stop) of this rank's share of a batch in the rank's sequence."""
        first, last = (-(-(self._boundary(k) - self.rank) // self.world_size) for k in (batch, batch + 1))
        return first, last

    def _boundary(self, batch: int) -> int:
        if self.batch_rows is not None:
            return batch * self.batch_rows
        return batch * self.num_rows // self.num_batches

    def windows(self, epoch: int, number: int) -> list[tuple[int, int]]:
        """The selected rows [start, stop) that each lane of this rank serves in a round."""
        whole = self.num_rows // self.num_lanes // self.window
        result = []
        for lane in self.lanes:
            start, stop = self.lane(lane)
            if number < whole:
                place = int(self._rng(epoch, lane).permutation(whole)[number]) if self.shuffle else number
                start += place * self.window
                stop = start + self.window
            else:
                start += whole * self.window
            result.append((start, stop))
        return result

    def order(self, epoch: int, number: int, bases: list[int]) -> Ints:
        """The rows of a round in this rank's sequence.

        Args:
            epoch (int): epoch.
            number (int): round.
            bases (list[int]): for each lane of this rank, where its window's first row is stored.

        Returns:
            Ints: int64, where each row of the round is stored.
        """
        columns = []
        for lane, base, (start, stop) in zip(self.lanes, bases, self.windows(epoch, number), strict=True):
            rng = self._rng(epoch, lane, number)
            columns.append(base + (rng.permutation(stop - start) if self.shuffle else np.arange(stop - start)))
        # lanes differ by one row at most, and the longer ones come first
        common = len(columns[-1])
        matrix = np.stack([column[:common] for column in columns], axis=1)
        rest = [column[common:] for column in columns]
        return np.concatenate([matrix.reshape(-1), *rest])

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *place])
