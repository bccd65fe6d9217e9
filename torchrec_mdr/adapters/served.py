"""Adapted layers as they serve: folded once, and tables of adapters whose rows come and go while a model runs.

Row 0 of every table is that of unknown domains: zeros, or the backbone's own norm. A row's domain has been turned into
its place in the tables before the pass, so that nothing here looks at data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.ops import products
from torchrec_mdr.ops.groups import DomainGroups


@dataclass(frozen=True)
class ServingPass:
    """What one pass of a serving model is about; it belongs to the thread that runs it.

    Args:
        rows (Tensor): int64 [B, V], each row's place in the tables of each division, 0 where its domain is unknown.
        combinations (Tensor | None): int64 [B], each row's place in tables of combinations, 0 where one is unknown.
        cache (dict[str, Any]): what layers share within this pass.
    """

    rows: Tensor
    combinations: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def current() -> ServingPass:
        """The pass that this thread is in.

        Raises:
            RuntimeError: there is none.
        """
        found = _current.get()
        if found is None:
            raise RuntimeError("a served layer was called outside its ServingModel, which alone knows the domains")
        return found

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes this the thread's pass for a while."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def groups(self, division: int, num_rows: int) -> DomainGroups:
        """The rows by their place in tables of num_rows rows; made once a pass."""
        key = f"groups {division} {num_rows}"
        if key not in self.cache:
            self.cache[key] = DomainGroups.from_ids(self.rows[:, division], num_rows)
        groups: DomainGroups = self.cache[key]
        return groups


_current: ContextVar[ServingPass | None] = ContextVar("serving pass", default=None)


class ServedBank(nn.Module):
    """Tables [1 + N, ...] over the adapters of one division: row 0 of unknown domains, then one for each of N adapters.

    Args:
        division (int): whose domains the adapters belong to.
        tables (Mapping[str, Tensor]): [N, ...] by name.
        unknown (Mapping[str, Tensor] | None): row 0 of each; zeros where left out.
    """

    def __init__(
        self, division: int, tables: Mapping[str, Tensor], unknown: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.division = division
        for name, table in tables.items():
            first = table.new_zeros(table.shape[1:]) if unknown is None else unknown[name]
            self.register_buffer(name, torch.cat([first.unsqueeze(0), table]).detach().contiguous())

    @property
    def tables(self) -> dict[str, Tensor]:
        """All tables by name."""
        return dict(self.named_buffers(recurse=False))

    @property
    def num_rows(self) -> int:
        """Rows of every table, that of unknown domains included."""
        return len(next(self.buffers()))

    def resize(self, num_adapters: int) -> None:
        """Gives the tables room for so many adapters, all zero."""
        for name, table in self.tables.items():
            room = table.new_zeros(1 + num_adapters, *table.shape[1:])
            room[0] = table[0]
            setattr(self, name, room)

    def pick(self, name: str, rows: Tensor) -> Tensor:
        """A table's rows, one for each row of the batch."""
        return self.get_buffer(name).index_select(0, rows)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"division={self.division}, " + ", ".join(f"{n}={tuple(t.shape)}" for n, t in self.tables.items())


class ServedLowRank(ServedBank):
    """One low-rank adapter a row: ``down`` [1 + N, r, in], ``up`` [1 + N, r, out] and ``bias`` [1 + N, out]."""

    def project_down(self, x: Tensor, now: ServingPass) -> Tensor:
        """``z_i = down[d_i] x_i``: [B, in] -> [B, r]."""
        table = self.get_buffer("down")
        if self._is_grouped(x):
            return products.down(x, table, now.groups(self.division, self.num_rows))
        return (self.pick("down", now.rows[:, self.division]) * x.unsqueeze(1)).sum(2)

    def project_up(self, start: Tensor, z: Tensor, weight: Tensor | None, now: ServingPass) -> Tensor:
        """``start_i + weight_i (up[d_i]^T z_i + bias[d_i])``: [B, out], [B, r] and, where given, [B, 1] -> [B, out]."""
        if weight is not None:
            z = z * weight
        if self._is_grouped(z):
            z = torch.cat([z, torch.ones_like(z[:, :1]) if weight is None else weight], 1)
            groups = now.groups(self.division, self.num_rows)
            return products.up(z, self.get_buffer("up"), groups, start, last=self.get_buffer("bias"))
        rows = now.rows[:, self.division]
        bias = self.pick("bias", rows)
        lifted = (self.pick("up", rows) * z.unsqueeze(2)).sum(1)
        return start + (lifted + (bias if weight is None else bias * weight))

    def _is_grouped(self, x: Tensor) -> bool:
        """Whether kernels over groups of rows do it; what is compiled consists of PyTorch's operators alone."""
        return not torch.compiler.is_compiling() and self.get_buffer("down").dtype == x.dtype


class ServedAdapter(nn.Module, ABC):
    """What stands beside a layer of a serving model."""

    @abstractmethod
    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's input [B, in] and output [B, out] -> the output with the adapters' part added [B, out]."""


class ServedSingle(ServedAdapter):
    """One bank beside the layer.

    Args:
        bank (ServedLowRank): its adapters.
    """

    def __init__(self, bank: ServedLowRank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """See :class:`ServedAdapter`."""
        now = ServingPass.current()
        return self.bank.project_up(base, self.bank.project_down(x, now), None, now)


class ServedLinear(nn.Module):
    """A linear layer and what stands beside it.

    Args:
        linear (nn.Linear): its weights are copied.
        adapter (ServedAdapter): what stands beside it.
    """

    def __init__(self, linear: nn.Linear, adapter: ServedAdapter) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        adapted: Tensor = self.adapter(x, F.linear(x, self.get_buffer("weight"), self._buffers["bias"]))
        return adapted


class ServedNorm(nn.Module):
    """Norms that are a product and a sum a row, by the rows' domains or their combinations.

    Args:
        scale (Tensor): [N, F], or [N, K, F]: of each domain of the first division, of each of the K combinations of the
            others that it is in.
        shift (Tensor): the same.
        unknown (tuple[Tensor, Tensor]): [F] each, the backbone's own.
        sizes (Sequence[int]): number of domains of each division.
    """

    def __init__(self, scale: Tensor, shift: Tensor, unknown: tuple[Tensor, Tensor], sizes: Sequence[int]) -> None:
        super().__init__()
        self.by_combination = len(sizes) > 1
        first = [own.expand(scale.shape[1:]) for own in unknown]
        self.bank = ServedBank(0, {"scale": scale, "shift": shift}, {"scale": first[0], "shift": first[1]})

    def forward(self, input: Tensor) -> Tensor:
        """[B, F] -> [B, F]."""
        now = ServingPass.current()
        scale, shift = self.bank.get_buffer("scale"), self.bank.get_buffer("shift")
        rows = now.rows[:, 0]
        if self.by_combination:
            assert now.combinations is not None, "the model works along several divisions"
            rows, scale, shift = now.combinations, scale.flatten(0, 1), shift.flatten(0, 1)
        return input * scale.index_select(0, rows) + shift.index_select(0, rows)


def combination_rows(rows: Tensor, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows' places in tables of combinations, 0 where any domain is unknown.

    Args:
        rows (Tensor): int64 [B], places of the first division's domains, 0 where unknown.
        ids (Tensor): int64 [B, V - 1], the domains under the other divisions, -1 where unknown.
        sizes (Sequence[int]): number of domains of each of the other divisions.

    Example::

        >>> combination_rows(torch.tensor([1, 2, 2, 0]), torch.tensor([[0], [1], [-1], [1]]), [2]).tolist()
        [2, 5, 0, 0]
    """
    place = rows
    for column, size in zip(ids.unbind(1), sizes, strict=True):
        place = place * size + column
    known = (rows > 0) & (ids >= 0).all(1)
    return torch.where(known, place, 0)
