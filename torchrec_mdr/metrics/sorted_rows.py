"""The rows of an evaluation in order, in eight bytes a row, and the runs of equal logits among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ROWS = 1 << 18  # rows that are computed with at a time
_LOGIT_BITS = 32
_HALF, _ALL = 1 << (_LOGIT_BITS - 1), (1 << _LOGIT_BITS) - 1


class Block(NamedTuple):
    """Rows in order, with all rows of each of their runs: equal logits of one group.

    Args:
        logits (Tensor): float64 [B], ascending within a group.
        labels (Tensor): int64 [B], 0 or 1, ascending within a run.
        groups (Tensor): int64 [B], ascending.
        weights (Tensor | None): float64 [B], ascending within equal labels of a run; None where each row counts 1.
        places (Tensor | None): int64 [B], where the rows lay before they were sorted; None where nobody asks.
    """

    logits: Tensor
    labels: Tensor
    groups: Tensor
    weights: Tensor | None = None
    places: Tensor | None = None


class SortedRows:
    """Rows sorted by group, logit, label and weight: their one order, whatever they came in.

    A row is one integer: its group, 32 bits for its logit, one for its label. A float32's bits sort as it does, once
    those of negative ones are turned round; a float64 is its place among the different ones.

    Args:
        logits (Tensor): float32 or float64 [B], finite.
        labels (Tensor): integers [B], 0 or 1.
        groups (Tensor | None): integers [B], in [0, 2 ** 30); None for one group.
        weights (Tensor | None): float32 [B], at least 0; 1 each where left out.
        places (bool): whether blocks say where rows lay before.

    Example::

        >>> rows = SortedRows(torch.tensor([0.5, -1.0, 0.5]), torch.tensor([1, 0, 0]), torch.tensor([0, 1, 0]))
        >>> [(block.groups.tolist(), block.logits.tolist(), block.labels.tolist()) for block in rows.blocks()]
        [([0, 0, 1], [0.5, 0.5, -1.0], [0, 1, 0])]
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
        places: bool = False,
    ) -> None:
        self._different = torch.unique(logits) if logits.dtype == torch.float64 else None
        self._keys = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for begin in range(0, len(logits), BLOCK_ROWS):
            own = slice(begin, begin + BLOCK_ROWS)
            key = self._code(logits[own]) << 1 | labels[own].long()
            self._keys[own] = key if groups is None else groups[own].long() << (_LOGIT_BITS + 1) | key
        self._weights: Tensor | None = None
        self._places: Tensor | None = None
        if weights is not None or places:
            self._sort_all(weights, places)
        elif self._keys.device.type == "cpu":
            self._keys.numpy().sort()  # in place
        else:
            self._keys = torch.sort(self._keys).values

    def _sort_all(self, weights: Tensor | None, places: bool) -> None:
        """Sorts what belongs to the keys with them: first by weight, then by key."""
        order = None
        if weights is not None:
            self._weights, order = torch.sort(weights, stable=True)
            self._keys = self._keys[order]
        self._keys, moved = torch.sort(self._keys, stable=True)
        if self._weights is not None:
            self._weights = self._weights[moved]
        if places:
            self._places = moved if order is None else order[moved]

    def __len__(self) -> int:
        return len(self._keys)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """The rows in their order, some at a time; a block ends where a run does.

        Args:
            rows (int): of a block, at least, but for the last.
        """
        begin = 0
        while begin < len(self):
            end = min(begin + rows, len(self))
            if end < len(self):
                last = self._keys[end - 1 : end] | 1  # the run's, were its label 1
                end = int(torch.searchsorted(self._keys, last, right=True))
            yield self._block(slice(begin, end))
            begin = end

    def whole(self) -> Block:
        """All rows in their order, 24 bytes a row or more."""
        return self._block(slice(0, len(self)))

    def _block(self, own: slice) -> Block:
        keys = self._keys[own]
        weights = None if self._weights is None else self._weights[own].double()
        places = None if self._places is None else self._places[own]
        return Block(self._logits(keys >> 1 & _ALL), keys & 1, keys >> (_LOGIT_BITS + 1), weights, places)

    def _code(self, logits: Tensor) -> Tensor:
        """Integers that sort as the logits do, those of equal ones equal. [B] -> int64 [B] in [0, 2 ** 32)."""
        if self._different is not None:
            return torch.searchsorted(self._different, logits)
        bits = logits.view(torch.int32).long()
        return torch.where(bits < 0, -(bits & (_HALF - 1)), bits) + _HALF  # -0.0 becomes 0.0

    def _logits(self, codes: Tensor) -> Tensor:
        """The logits that integers stand for. int64 [B] -> float64 [B]."""
        if self._different is not None:
            return self._different[codes]
        signed = codes - _HALF
        sizes = signed.abs().int().view(torch.float32).double()
        return torch.where(signed < 0, -sizes, sizes)


class Runs(NamedTuple):
    """Runs of a block, [R] each: what of them there is, or weighs, and what lies below them in their groups.

    Args:
        groups (Tensor): int64, ascending.
        logits (Tensor): float64.
        rows (Tensor): int64, how many they have.
        positives (Tensor): int64; float64 where rows have weights. So are the three below.
        negatives (Tensor): the same.
        positives_below (Tensor): those of the runs before in the group, in blocks before, too.
        negatives_below (Tensor): the same.
    """

    groups: Tensor
    logits: Tensor
    rows: Tensor
    positives: Tensor
    negatives: Tensor
    positives_below: Tensor
    negatives_below: Tensor


def runs_of(blocks: Iterable[Block]) -> Iterator[tuple[Block, Runs]]:
    """Each block's runs, with the block."""
    group, carried = -1, [0.0, 0.0]
    for block in blocks:
        if not len(block.groups):
            continue
        ends = _is_last(block).nonzero().flatten()
        groups, rows = block.groups[ends], torch.diff(ends, prepend=ends.new_tensor([-1]))
        counts = _counts(block, ends, rows)
        goes_on = int(groups[0]) == group
        below = [_below(own, groups, before if goes_on else 0) for own, before in zip(counts, carried, strict=True)]
        yield block, Runs(groups, block.logits[ends], rows, *counts, *below)
        group = int(groups[-1])
        carried = [(before[-1] + own[-1]).item() for own, before in zip(counts, below, strict=True)]


def _is_last(block: Block) -> Tensor:
    """Whether a row is the last of its run. bool [B]."""
    last = torch.ones_like(block.groups, dtype=torch.bool)
    last[:-1] = (block.groups[1:] != block.groups[:-1]) | (block.logits[1:] != block.logits[:-1])
    return last


def _counts(block: Block, ends: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positives and negatives of runs, or their weights."""
    labels, weights = block.labels, block.weights
    if weights is None:
        positives = torch.diff(labels.cumsum(0)[ends], prepend=ends.new_zeros(1))
        return positives, rows - positives
    return (
        torch.segment_reduce(weights * labels, "sum", lengths=rows),
        torch.segment_reduce(weights * (1 - labels), "sum", lengths=rows),
    )


def _below(counts: Tensor, groups: Tensor, carried: float) -> Tensor:
    """The sum of the counts of the runs before in the same group, and for the first group of what blocks before had."""
    _, place, sizes = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    below = below - below[sizes.cumsum(0) - sizes][place]
    below[: int(sizes[0])] += carried
    return below


def slices(rows: int) -> Iterator[slice]:
    """Blocks of columns that are not sorted."""
    return (slice(begin, begin + BLOCK_ROWS) for begin in range(0, rows, BLOCK_ROWS))
