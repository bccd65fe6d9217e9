"""Rows in memory, in the form batches are gathered from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
_ID_TYPES: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.int64}
WIDTHS = tuple(_ID_TYPES)  # bytes of an id


@dataclass(frozen=True)
class Bags:
    """A multi-hot feature: row i has the ids values[offsets[i]:offsets[i + 1]].

    Args:
        values (Array): ids of all rows, one after another.
        offsets (Array): int64 [n + 1], from 0.
    """

    values: Array
    offsets: Array

    def __getitem__(self, rows: slice) -> Bags:
        start, stop, _ = rows.indices(len(self.offsets) - 1)
        offsets = self.offsets[start : max(stop, start) + 1]
        return Bags(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, index: Array) -> Bags:
        """The rows at an index."""
        starts, lengths = self.offsets[index], np.diff(self.offsets)[index]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return Bags(self.values[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)

    @staticmethod
    def cat(parts: Sequence[Bags], kind: np.dtype[Any]) -> Bags:
        """Rows of several, one after another; kind is the ids' type."""
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), *lengths])
        np.cumsum(offsets, out=offsets)
        return Bags(np.concatenate([np.empty(0, dtype=kind), *(part.values for part in parts)]), offsets)


class Form(NamedTuple):
    """How a reader's rows lie in memory: every column in the narrowest type that holds its values.

    Args:
        widths (tuple[int, ...]): bytes of an id of each feature with one id a row: 1, 2, 4 or 8.
        num_bags (int): multi-hot features.
        num_dense (int): dense features.
        key_type (np.dtype): of the keys.
        bag_type (np.dtype): of multi-hot ids.
        has_weights (bool): whether rows carry weights.
    """

    widths: tuple[int, ...]
    num_bags: int
    num_dense: int
    key_type: np.dtype[Any]
    bag_type: np.dtype[Any]
    has_weights: bool

    @property
    def row_bytes(self) -> int:
        """Memory of a row, multi-hot ids apart."""
        offsets = 8 * self.num_bags
        return 1 + sum(self.widths) + 4 * (self.num_dense + self.has_weights) + self.key_type.itemsize + offsets

    def columns(self, rows: int) -> list[Array]:
        """Columns to be filled: labels, weights, dense, keys, and the ids by their widths."""
        return [
            np.empty(rows, dtype=np.uint8),
            np.empty(rows if self.has_weights else 0, dtype=np.float32),
            np.empty((rows, self.num_dense), dtype=np.float32),
            np.empty(rows, dtype=self.key_type),
            *(np.empty((rows, self.widths.count(width)), dtype=kind) for width, kind in _ID_TYPES.items()),
        ]


def id_width(num_embeddings: int) -> int:
    """Bytes that hold an id of a table.

    Example::

        >>> [id_width(size) for size in (256, 257, 65_536, 65_537, 2**31 + 1)]
        [1, 2, 2, 4, 8]
    """
    return next((width for width, most in ((1, 2**8), (2, 2**16), (4, 2**31)) if num_embeddings <= most), 8)


class Rows:
    """Columns of n rows.

    Args:
        form (Form): types and number of the columns.
        columns (Sequence[Array]): see :meth:`Form.columns`.
        bags (tuple[Bags, ...]): the multi-hot sparse features.
    """

    def __init__(self, form: Form, columns: Sequence[Array], bags: tuple[Bags, ...]) -> None:
        self.form = form
        self.bags = bags
        self._columns = list(columns)

    def __len__(self) -> int:
        return len(self._columns[0])

    @property
    def labels(self) -> Array:
        """uint8 [n], 0 or 1."""
        return self._columns[0]

    @property
    def weights(self) -> Array | None:
        """float32 [n]; None where rows have none."""
        return self._columns[1] if self.form.has_weights else None

    @property
    def dense(self) -> Array:
        """float32 [n, num_dense_features]."""
        return self._columns[2]

    @property
    def keys(self) -> Array:
        """[n], unsigned: the row's combination of domains, a number with the first division's domain in front."""
        return self._columns[3]

    def ids(self, feature: int) -> Array:
        """[n], ids of a feature, counted among those with one id a row."""
        width = self.form.widths[feature]
        place = self.form.widths[:feature].count(width)
        matrix: Array = self._columns[4 + list(_ID_TYPES).index(width)]
        return matrix[:, place]

    def domains(self, sizes: Sequence[int]) -> Array:
        """int64 [n, V], the domains that the keys stand for, in divisions of these sizes."""
        rest = self.keys.astype(np.int64)
        found = np.empty((len(rest), len(sizes)), dtype=np.int64)
        for division in reversed(range(1, len(sizes))):
            rest, found[:, division] = np.divmod(rest, sizes[division])
        found[:, 0] = rest
        return found

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        return sum(column.nbytes for column in self._columns) + sum(
            bag.values.nbytes + bag.offsets.nbytes for bag in self.bags
        )

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.form, [column[rows] for column in self._columns], tuple(bag[rows] for bag in self.bags))

    def take(self, index: Array) -> Rows:
        """The rows at an index."""
        columns = [c.take(index, axis=0) if len(c) else c for c in self._columns] if len(self) else self._columns
        return Rows(self.form, columns, tuple(bag.take(index) for bag in self.bags))

    @staticmethod
    def cat(parts: Iterable[Rows], form: Form, num_rows: int) -> Rows:
        """Rows of several, one after another; each part is let go before the next one is asked for.

        Args:
            parts (Iterable[Rows]): of one form.
            form (Form): theirs.
            num_rows (int): of all of them.
        """
        columns = form.columns(num_rows)
        bags: list[list[Bags]] = [[] for _ in range(form.num_bags)]
        start = 0
        for part in parts:
            for column, own in zip(columns, part._columns, strict=True):
                column[start : start + len(own)] = own
            for found, bag in zip(bags, part.bags, strict=True):
                found.append(bag)
            start += len(part)
        return Rows(form, columns, tuple(Bags.cat(found, form.bag_type) for found in bags))

    def jagged(self, multi_hot: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Values and lengths of the sparse features, feature by feature, as a KeyedJaggedTensor takes them.

        Args:
            multi_hot (Sequence[bool]): for each sparse feature in order, whether it is one of `bags`.

        Returns:
            tuple[Tensor, Tensor]: values int64, lengths int32 [num_sparse_features * n].
        """
        size = len(self) * len(self.form.widths) + sum(len(bag.values) for bag in self.bags)
        values = np.empty(size, dtype=np.int64)
        lengths = np.ones(len(multi_hot) * len(self), dtype=np.int32)
        bags, single, start = iter(self.bags), 0, 0
        for feature, many in enumerate(multi_hot):
            if many:
                bag = next(bags)
                own = bag.values
                lengths[feature * len(self) : (feature + 1) * len(self)] = np.diff(bag.offsets)
            else:
                own = self.ids(single)
                single += 1
            values[start : start + len(own)] = own
            start += len(own)
        return torch.from_numpy(values), torch.from_numpy(lengths)
