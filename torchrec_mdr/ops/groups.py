"""How the rows of a batch fall into groups that share one adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DomainGroups:
    """Rows of a batch grouped by the adapter that serves them, in the form the grouped product takes.

    Rows of one group lie next to each other, either because the loader sorted them (``permutation`` is None) or after
    ``permutation`` is applied. Groups may be empty, and several groups may use the same adapter. Rows whose id is -1
    have no adapter: they are in no group and come last, or in a group whose adapter is -1.

    Args:
        ids (Tensor): int64 [B], the adapter of each row, in the batch's own order; -1 for none.
        offsets (Tensor): int32 [G], the exclusive end of each group among the grouped rows.
        num_adapters (int): number of adapters that ids can name.
        adapter_ids (Tensor | None): int64 [G], the adapter of each group; None where group g uses adapter g.
        permutation (Tensor | None): int64 [B], the batch row at each grouped position; None where rows are grouped.
        inverse (Tensor | None): int64 [B], the grouped position of each batch row; only with permutation.
        may_miss (bool): whether there may be rows without an adapter; False where the host knows that there are none.

    Example::

        >>> groups = DomainGroups.from_ids(torch.tensor([2, 0, 2]), num_adapters=4)
        >>> groups.offsets.tolist(), groups.permutation.tolist()
        ([1, 1, 3, 3], [1, 0, 2])
    """

    ids: Tensor
    offsets: Tensor
    num_adapters: int
    adapter_ids: Tensor | None = None
    permutation: Tensor | None = None
    inverse: Tensor | None = None
    may_miss: bool = False

    @staticmethod
    def from_ids(ids: Tensor, num_adapters: int) -> DomainGroups:
        """Groups rows that come in any order.

        Runs without a host sync on an accelerator: ids are checked on CPU only, where reading them costs nothing.
        Elsewhere, and in compiled code, an id outside the range counts as -1.

        Args:
            ids (Tensor): int64 or int32 [B], in [-1, num_adapters).
            num_adapters (int): N.

        Returns:
            DomainGroups: num_adapters groups, with a permutation.

        Raises:
            ValueError: an id is out of range (on CPU), or ids is not an integer vector.
        """
        ids, offsets, permutation, inverse, may_miss = _sorted(ids, num_adapters)
        if isinstance(ids, torch.fx.Proxy):
            may_miss = True
        return DomainGroups(ids, offsets, num_adapters, None, permutation, inverse, may_miss)

    @staticmethod
    def from_sorted_ids(ids: Tensor, num_adapters: int) -> DomainGroups:
        """Groups rows that are already sorted by id: no permutation.

        Args:
            ids (Tensor): int64 [B], ascending.
            num_adapters (int): ids lie in [0, num_adapters).

        Returns:
            DomainGroups: num_adapters groups.
        """
        return DomainGroups(ids=ids, offsets=_ends(ids, num_adapters), num_adapters=num_adapters)

    @staticmethod
    def of_one(num_rows: int, device: torch.device) -> DomainGroups:
        """One group of all rows, with the one adapter that there is."""
        ids = torch.zeros(1, dtype=torch.int64, device=device).expand(num_rows)
        return DomainGroups(ids, torch.full((1,), num_rows, dtype=torch.int32, device=device), num_adapters=1)

    def with_all_rows(self) -> DomainGroups:
        """Groups in which rows without an adapter have one, any, for products that take no row out."""
        if not self.may_miss:
            return self
        offsets = torch.cat([self.offsets[:-1], self.offsets.new_full((1,), self.ids.numel())])
        owners = None if self.adapter_ids is None else self.adapter_ids.clamp(min=0)
        return replace(self, offsets=offsets, adapter_ids=owners)

    def to(self, device: torch.device, non_blocking: bool = False) -> DomainGroups:
        """Copies the tensors to a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the caching allocator that the tensors are used on this stream."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def pin_memory(self) -> DomainGroups:
        """Copies the tensors to page-locked memory."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)

    def repeat_interleave(self, repeats: int) -> DomainGroups:
        """Groups of B * repeats rows, where each row comes several times, one after the other."""

        def spread(order: Tensor | None) -> Tensor | None:
            if order is None:
                return None
            return (order.unsqueeze(1) * repeats + torch.arange(repeats, device=order.device)).flatten()

        ids = self.ids.repeat_interleave(repeats, output_size=self.ids.shape[0] * repeats)
        order, inverse = spread(self.permutation), spread(self.inverse)
        return replace(self, ids=ids, offsets=self.offsets * repeats, permutation=order, inverse=inverse)

    def group(self, rows: Tensor) -> Tensor:
        """[B, ...] in the batch's order -> [B, ...] in grouped order."""
        return rows if self.permutation is None else rows.index_select(0, self.permutation)

    def ungroup(self, rows: Tensor) -> Tensor:
        """[B, ...] in grouped order -> [B, ...] in the batch's order."""
        if self.inverse is not None:
            return rows.index_select(0, self.inverse)
        return rows if self.permutation is None else torch.empty_like(rows).index_copy(0, self.permutation, rows)


@dataclass(frozen=True)
class BatchDomains:
    """The domains of a batch's rows under every division.

    Args:
        ids (Tensor): int64 [B, V].
        groups (tuple[DomainGroups, ...]): one per division; none where they are made when they are asked for.
        sizes (tuple[int, ...]): number of domains of each division, where there are no groups.
    """

    ids: Tensor
    groups: tuple[DomainGroups, ...] = field(default_factory=tuple)
    sizes: tuple[int, ...] = ()

    @staticmethod
    def from_ids(ids: Tensor, sizes: Sequence[int], grouped: bool = True) -> BatchDomains:
        """Groups unsorted rows, per division.

        Args:
            ids (Tensor): int64 [B, V], or [B] where V = 1.
            sizes (Sequence[int]): number of domains of each division.
            grouped (bool): whether groups are made at once, and not when one is asked for.

        Raises:
            ValueError: the shape does not fit the divisions, or an id is outside its division (on CPU).
        """
        if not isinstance(ids, torch.fx.Proxy):
            given, ids = ids, ids.unsqueeze(1) if ids.dim() == 1 else ids
            if ids.dim() != 2 or ids.shape[1] != len(sizes):
                raise ValueError(
                    f"domain_ids must be [B, {len(sizes)}], one column a division, not {list(given.shape)}"
                )
        elif len(sizes) == 1:
            ids = ids.reshape(-1, 1)
        if not grouped:
            for v, size in enumerate(sizes if not isinstance(ids, torch.fx.Proxy) else ()):
                checked_ids(ids[:, v], size)
            return BatchDomains(ids, (), tuple(sizes))
        return BatchDomains(ids, tuple(DomainGroups.from_ids(ids[:, v], size) for v, size in enumerate(sizes)))

    @staticmethod
    def from_sorted(ids: Tensor, sizes: Sequence[int], static: bool = False) -> BatchDomains:
        """Groups rows that the loader sorted by their combination of domains, first division major.

        No row is moved for any division: the first one's domains are contiguous, the others get one group for each
        combination that is present.

        Args:
            ids (Tensor): int64 [B, V], rows in ascending lexicographic order.
            sizes (Sequence[int]): number of domains of each division.
            static (bool): groups for all combinations there can be, so that every batch has as many.
        """
        first = DomainGroups.from_sorted_ids(ids[:, 0].contiguous(), sizes[0])
        if len(sizes) == 1:
            return BatchDomains(ids, (first,))
        if static:
            combinations, radix = _every_combination(tuple(sizes), ids.device)
            offsets = _ends((ids * radix).sum(1), len(combinations))
            return BatchDomains(ids, (first, *_others(ids, offsets, combinations, sizes)))
        # twenty times as fast as unique_consecutive over rows
        is_last = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        is_last[:-1] = (ids[1:] != ids[:-1]).any(dim=1)
        last = is_last.nonzero().flatten()
        combinations, offsets = ids[last], (last + 1).to(torch.int32)
        return BatchDomains(ids, (first, *_others(ids, offsets, combinations, sizes)))

    def repeat_interleave(self, repeats: int) -> BatchDomains:
        """The domains of B * repeats rows, where each row comes several times, one after the other."""
        ids = self.ids.repeat_interleave(repeats, 0, output_size=self.ids.shape[0] * repeats)
        return BatchDomains(ids, tuple(groups.repeat_interleave(repeats) for groups in self.groups), self.sizes)

    def to(self, device: torch.device, non_blocking: bool = False) -> BatchDomains:
        """Copies the tensors to a device."""
        return BatchDomains(
            self.ids.to(device, non_blocking=non_blocking),
            tuple(groups.to(device, non_blocking) for groups in self.groups),
            self.sizes,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the caching allocator that the tensors are used on this stream."""
        self.ids.record_stream(stream)
        for groups in self.groups:
            groups.record_stream(stream)

    def pin_memory(self) -> BatchDomains:
        """Copies the tensors to page-locked memory."""
        return BatchDomains(self.ids.pin_memory(), tuple(groups.pin_memory() for groups in self.groups), self.sizes)


@cache
def _every_combination(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """All combinations of domains int64 [C, V] in ascending order, and the place values by which they are counted."""
    every = torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
    return every, torch.tensor([prod(sizes[v + 1 :]) for v in range(len(sizes))], device=device)


def _others(ids: Tensor, offsets: Tensor, combinations: Tensor, sizes: Sequence[int]) -> Iterator[DomainGroups]:
    """Groups under all divisions but the first, one for each combination of domains."""
    for v, size in enumerate(sizes):
        if v > 0:
            yield DomainGroups(ids[:, v].contiguous(), offsets, size, adapter_ids=combinations[:, v].contiguous())


def checked_ids(ids: Tensor, num_adapters: int) -> tuple[Tensor, bool]:
    """Ids as int64 in [-1, num_adapters), and whether one may be -1.

    Raises:
        ValueError: ids of a wrong type or, on CPU in eager mode, out of range.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"domain ids must be an int64 vector, not {ids.dtype} of shape {list(ids.shape)}")
    ids = ids.long()
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where((ids >= 0) & (ids < num_adapters), ids, -1), True
    if not ids.numel():
        return ids, False
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < -1 or high >= num_adapters:
        row = int(((ids < -1) | (ids >= num_adapters)).nonzero()[0])
        raise ValueError(
            f"domain id {int(ids[row])} in row {row} is outside the division's range [0, {num_adapters}); "
            "give unknown domains the id -1, or build the model with more domains"
        )
    return ids, low < 0


def _sorted(ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Checked ids, the groups' ends, where grouped rows come from and go back to, and whether ids may be -1."""
    ids, may_miss = checked_ids(ids, num_adapters)
    keys = torch.where(ids < 0, num_adapters, ids) if may_miss else ids  # rows without an adapter come last
    sorted_keys, permutation = torch.sort(keys, stable=True)
    places = torch.arange(ids.numel(), device=ids.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, places)
    return ids, _ends(sorted_keys, num_adapters), permutation, inverse, may_miss


torch.fx.wrap("_sorted")  # one node in a traced graph: what it does depends on the ids


def _ends(sorted_ids: Tensor, num_adapters: int) -> Tensor:
    # searchsorted, since bincount syncs with the host on CUDA
    bounds = torch.arange(1, num_adapters + 1, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids.contiguous(), bounds).to(torch.int32)
