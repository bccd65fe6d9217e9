"""Rows in memory, in the form batches are gathered from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


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
    def cat(parts: Sequence[Bags]) -> Bags:
        """Rows of several, one after another."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return Bags(np.concatenate([part.values for part in parts]), offsets)


@dataclass(frozen=True)
class Rows:
    """Columns of n rows.

    Args:
        labels (Array): float32 [n].
        dense (Array): float32 [n, num_dense_features].
        domains (Array): int32 [n, V].
        keys (Array): [n], unsigned; orders rows by their combination of domains, first division major.
        ids (Array): [n, S], the S sparse features with one id a row.
        bags (tuple[Bags, ...]): the multi-hot sparse features.
    """

    labels: Array
    dense: Array
    domains: Array
    keys: Array
    ids: Array
    bags: tuple[Bags, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows._of([column[rows] for column in self._columns()], [bag[rows] for bag in self.bags])

    def take(self, index: Array) -> Rows:
        """The rows at an index."""
        columns = [column.take(index, axis=0) for column in self._columns()]
        return Rows._of(columns, [bag.take(index) for bag in self.bags])

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Rows of several, one after another; at least one."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._columns() for part in parts), strict=True)
        bags = zip(*(part.bags for part in parts), strict=True)
        return Rows._of([np.concatenate(column) for column in columns], [Bags.cat(bag) for bag in bags])

    def _columns(self) -> tuple[Array, Array, Array, Array, Array]:
        return self.labels, self.dense, self.domains, self.keys, self.ids

    @staticmethod
    def _of(columns: Sequence[Array], bags: Sequence[Bags]) -> Rows:
        labels, dense, domains, keys, ids = columns
        return Rows(labels, dense, domains, keys, ids, tuple(bags))

    def jagged(self, multi_hot: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Values and lengths of the sparse features, feature by feature, as a KeyedJaggedTensor takes them.

        Args:
            multi_hot (Sequence[bool]): for each sparse feature in order, whether it is one of `bags`.

        Returns:
            tuple[Tensor, Tensor]: values int64, lengths int32 [num_sparse_features * n].
        """
        ids = self.ids.T.astype(np.int64, order="C")
        if not self.bags:
            return torch.from_numpy(ids.reshape(-1)), torch.ones(ids.size, dtype=torch.int32)
        single, bags = iter(ids), iter(self.bags)
        values, lengths = [], []
        for many in multi_hot:
            if many:
                bag = next(bags)
                values.append(bag.values.astype(np.int64))
                lengths.append(np.diff(bag.offsets).astype(np.int32))
            else:
                values.append(next(single))
                lengths.append(np.ones(len(self), dtype=np.int32))
        return torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(lengths))
