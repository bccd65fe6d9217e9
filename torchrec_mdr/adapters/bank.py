"""Banks: the adapters of one layer for all domains, stacked in one tensor per role."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows, ParameterGroup
from torchrec_mdr.adapters.merging import LowRankPart, Merging
from torchrec_mdr.adapters.served import ServedAdapter, ServedLowRank, ServedSingle
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import Base, grouped_low_rank

_for_tables: ContextVar[bool] = ContextVar("_for_tables", default=False)


@contextmanager
def banks_for_tables() -> Iterator[None]:
    """Has banks that fit into embedding tables be built on the meta device for a while: no memory is taken."""
    token = _for_tables.set(True)
    try:
        yield
    finally:
        _for_tables.reset(token)


class Bank(nn.Module, DomainModule):
    """A module whose parameters and buffers are stacked over adapters: row i of each tensor belongs to adapter i.

    Args:
        num_adapters (int): rows of every tensor.
        division (int): the division whose domains the adapters belong to.
    """

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS
    fits_table: ClassVar[bool] = False  # whether it reads its rows by `present` alone, so that a table may hold them
    step_tensors: ClassVar[int] = 0  # as large as its own that a step makes, beside the gradients it keeps

    def __init__(self, num_adapters: int, division: int = 0) -> None:
        super().__init__()
        if num_adapters < 1:
            raise ValueError(f"a bank needs at least one adapter, not {num_adapters}")
        self.num_adapters = num_adapters
        self.division = division
        self.table: str | None = None  # the embedding table that holds its rows, in place of parameters

    def empty_rows(self, *shape: int) -> Tensor:
        """[num_adapters, ...] without values; on the meta device where a table will hold them."""
        meta = _for_tables.get() and self.fits_table
        return torch.empty(self.num_adapters, *shape, device="meta" if meta else None)

    def present(self, state: DomainState) -> tuple[Self, DomainGroups]:
        """A bank that holds the adapters of a pass's rows, and the rows' groups by its adapters.

        That is the bank itself; or, where a table holds its rows, one of the domains in this pass alone.
        """
        if self.table is None:
            return self, state.groups(self.division)
        return state.cache["rows", self.table], state.present_groups(self.division)

    def over(self, tensors: Mapping[str, Tensor]) -> Self:
        """A bank of the same kind over other tensors [U, ...] by role, which need not be parameters."""
        bank = copy.copy(self)
        bank._parameters, bank.table = {}, None
        bank.num_adapters = len(next(iter(tensors.values())))
        for role, tensor in tensors.items():
            object.__setattr__(bank, role, tensor)
        return bank

    def row_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, each with adapters along its first dimension."""
        return {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}

    def trains_on(self, route: Route, division: int) -> bool:
        """Whether a stage on this route may train the bank."""
        return route is not Route.DOMAIN or self.division == division

    def rows_of_expert(self, expert_index: int, num_domains: int) -> slice:
        """The rows of one expert of every domain."""
        return slice(expert_index * num_domains, (expert_index + 1) * num_domains)

    def owners(self, num_domains: int) -> Tensor:
        """Int64 [num_adapters], the domain of each row, of a division of num_domains."""
        return torch.arange(self.num_adapters) % num_domains

    def owned_rows(self, expert_index: int, num_domains: int) -> dict[str, OwnedRows]:
        """Rows of one expert of every domain, by the names of their tensors."""
        rows = self.rows_of_expert(expert_index, num_domains)
        return {
            role: OwnedRows(tensor.detach()[rows], torch.arange(num_domains, device=tensor.device))
            for role, tensor in self.row_tensors().items()
        }

    def follows_domains(self, name: str) -> bool:
        """See :class:`DomainModule`."""
        return self.division == 0

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, sources: Tensor) -> None:
        """See :class:`DomainModule`; an expert's rows of all domains lie together."""
        load_by_expert(old, new, sources)

    def factored_tables(self) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """Parameters whose gradients a backward pass can leave as factors, see :class:`FactorList`."""
        return []


def load_by_expert(old: Tensor, new: Tensor, sources: Tensor) -> None:
    """Fills rows of old domains, where an expert's rows of all domains lie together; see :class:`DomainModule`."""
    experts = len(new) // len(sources)
    known = sources >= 0
    rows = old.view(experts, -1, *old.shape[1:])[:, sources[known]]
    new.view(experts, -1, *new.shape[1:])[:, known] = rows.to(new)


class LayerAdapter(nn.Module):
    """What stands beside a frozen layer: a bank alone, or several with something that combines them."""

    @abstractmethod
    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """The frozen layer's output with the adapters' part added.

        Args:
            x (Tensor): [B, in_features], the frozen layer's input.
            base (Tensor | LinearWeights): the layer's output [B, out_features], or the layer, to be computed with what
                is added to it.
            state (DomainState): route and domains of this pass; the route is not BASE.

        Returns:
            Tensor: [B, out_features].
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it adapts a layer")

    def freeze(self, route: Route) -> ServedAdapter:
        """The adapters as they serve on a route.

        Raises:
            ValueError: they do not say.
        """
        raise ValueError(f"{type(self).__name__} does not say how it serves; write its method freeze")

    def merge(self, merging: Merging) -> LowRankPart:
        """What the adapters add for one domain.

        Raises:
            ValueError: that depends on the row, or they do not say.
        """
        raise ValueError(f"{type(self).__name__} does not say how it is merged; write its method merge")


class LoRABank(Bank, LayerAdapter):
    """One low-rank adapter per domain: ``B_d A_d x + b_d`` (MLoRA, section 3; no activation, no alpha / r scaling).

    ``lora_A`` [N, r, in_features] is Glorot-initialised, ``lora_B`` [N, out_features, r] and ``bias`` [N, out_features]
    are zero, so that a new bank adds exactly zero. In memory the columns of a ``lora_B`` lie one after the other.

    Args:
        num_adapters (int): N.
        in_features (int): width of the adapted layer's input.
        out_features (int): width of its output.
        rank (int): r, at least 1.
        division (int): the division whose domains the adapters belong to.

    Raises:
        ValueError: the rank, a width or the number of adapters is below 1.

    Example::

        >>> bank = LoRABank(num_adapters=3, in_features=8, out_features=4, rank=2)
        >>> bank(torch.rand(5, 8), DomainGroups.from_ids(torch.tensor([0, 2, 2, 1, 0]), 3)).shape
        torch.Size([5, 4])
        >>> {name: tuple(tensor.shape) for name, tensor in bank.state_dict().items()}
        {'lora_A': (3, 2, 8), 'lora_B': (3, 4, 2), 'bias': (3, 4)}
    """

    fits_table: ClassVar[bool] = True

    def __init__(self, num_adapters: int, in_features: int, out_features: int, rank: int, division: int = 0) -> None:
        super().__init__(num_adapters, division)
        if min(in_features, out_features, rank) < 1:
            raise ValueError(f"in_features {in_features}, out_features {out_features} and rank {rank} must be positive")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.lora_A = nn.Parameter(self.empty_rows(rank, in_features))
        self.lora_B = nn.Parameter(self.empty_rows(rank, out_features).mT)
        self.bias = nn.Parameter(self.empty_rows(out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A anew and sets B and b to zero."""
        bound = (6.0 / (self.in_features + self.rank)) ** 0.5
        self.lora_A.uniform_(-bound, bound)
        self.lora_B.zero_()
        self.bias.zero_()

    def applied_B(self) -> Tensor:  # noqa: N802, the papers' letter
        """[N, out_features, r], what is applied after A."""
        return self.lora_B

    def up_table(self) -> Tensor:
        """[N, r + 1, out_features]: the columns of what is applied after A and, in the last row, the bias."""
        return torch.cat([self.applied_B().mT, self.bias.unsqueeze(1)], 1)

    def forward(self, x: Tensor, groups: DomainGroups, base: Base = None, expert_index: int = 0) -> Tensor:
        """The adapters' part for each row, added to base where that is given.

        Args:
            x (Tensor): [B, in_features].
            groups (DomainGroups): the adapter of each row.
            base (Tensor | LinearWeights | None): [B, out_features], or a linear layer of x; see
                :func:`grouped_low_rank`.
            expert_index (int): where the bank has several adapters a domain, which of them: row i uses adapter
                ``expert_index * groups.num_adapters + groups.ids[i]``.

        Returns:
            Tensor: [B, out_features], rows in x's order.

        Raises:
            ValueError: the groups name more adapters than the bank has.
        """
        rows = self.rows_of_expert(expert_index, groups.num_adapters)
        if rows.stop > self.num_adapters:
            raise ValueError(f"the groups name {rows.stop} adapters, the bank has {self.num_adapters}")
        tables = self.lora_A, self.applied_B(), self.bias
        if groups.num_adapters < self.num_adapters:  # or a slice's backward would fill a gradient of all with zeros
            lora_A, lora_B, bias = (table[rows] for table in tables)
            return grouped_low_rank(x, lora_A, lora_B, bias, groups, base)
        return grouped_low_rank(x, *tables, groups, base)

    def adapt(self, x: Tensor, base: Base, state: DomainState) -> Tensor:
        """See :meth:`LayerAdapter.adapt`."""
        bank, groups = self.present(state)
        adapted: Tensor = bank(x, groups, base, state.expert_index if bank is self else 0)
        return adapted

    def freeze(self, route: Route) -> ServedAdapter:
        """See :meth:`LayerAdapter.freeze`."""
        return ServedSingle(self.freeze_bank())

    def freeze_bank(self, **further: Tensor) -> ServedLowRank:
        """The bank as it serves, with further tables [N, ...] of its adapters."""
        tables = {"down": self.lora_A, "up": self.applied_B().mT, "bias": self.bias}
        return ServedLowRank(self.division, {**tables, **further})

    def merge(self, merging: Merging) -> LowRankPart:
        """See :meth:`LayerAdapter.merge`."""
        domain = merging.domains[self.division]
        rows = slice(domain, domain + 1) if domain >= 0 else slice(0, 0)
        tables = (table[rows].detach().double() for table in (self.lora_A, self.applied_B().mT, self.bias))
        down, up, bias = tables
        return LowRankPart(down.flatten(0, 1), up.flatten(0, 1), bias.sum(0))

    def factored_tables(self) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """See :class:`Bank`: A's, and those of B and b together."""
        return [(self.lora_A, None), (self.lora_B, self.bias)]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_adapters}, {self.in_features}, {self.out_features}, rank={self.rank}"
