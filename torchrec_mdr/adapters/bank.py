"""Banks: the adapters of one layer for all domains, stacked in one tensor per role."""

from __future__ import annotations

import enum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.context import DomainState, Route
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import adapted_linear, grouped_low_rank


class ParameterGroup(enum.Enum):
    """The groups of parameters a stage can train; every parameter is in exactly one, by the type of its module."""

    EMBEDDINGS = "embeddings"
    BACKBONE = "backbone"
    ADAPTERS = "adapters"
    GATE = "gate"


class Bank(nn.Module):
    """A module whose parameters and buffers are stacked over adapters: row i of each tensor belongs to adapter i.

    Args:
        num_adapters (int): rows of every tensor.
        division (int): the division whose domains the adapters belong to.
    """

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS

    def __init__(self, num_adapters: int, division: int = 0) -> None:
        super().__init__()
        if num_adapters < 1:
            raise ValueError(f"a bank needs at least one adapter, not {num_adapters}")
        self.num_adapters = num_adapters
        self.division = division

    def row_tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, each with adapters along its first dimension."""
        return {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}


class StageStart:
    """A module whose start in a stage depends on an earlier stage's result."""

    def start(self, route: Route, division: int) -> None:
        """Takes up that start, once the earlier stage's tensors are loaded.

        Args:
            route (Route): of the stage that begins.
            division (int): whose adapters it trains, on the DOMAIN route.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it starts a stage")


class GateModule(nn.Module):
    """A module that combines adapters: its own parameters form the group GATE."""

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.GATE


class ActiveBank(NamedTuple):
    """The one bank that adds to a layer in a pass.

    Args:
        bank (LoRABank): the bank.
        groups (DomainGroups): the adapter of each row.
        first (int): groups count from this adapter on.
    """

    bank: LoRABank
    groups: DomainGroups
    first: int = 0


class LayerAdapter(nn.Module):
    """What stands beside a frozen layer. A bank alone, or several with something that combines them."""

    def active(self, state: DomainState) -> ActiveBank | None:
        """The bank that works alone in this pass; None where there is more to it, and :meth:`adapt` has to be asked."""
        return None

    def adapt(self, base: Tensor, x: Tensor, state: DomainState) -> Tensor:
        """Adds the adapters' part to the frozen layer's output.

        Args:
            base (Tensor): [B, out_features], the frozen layer's output.
            x (Tensor): [B, in_features], the frozen layer's input.
            state (DomainState): route and domains of this pass; the route is not BASE.

        Returns:
            Tensor: [B, out_features].
        """
        active = self.active(state)
        if active is None:
            raise NotImplementedError(f"{type(self).__name__} does not say how it adapts a layer")
        bank, groups, first = active
        adapted: Tensor = bank(x, groups, first, base)
        return adapted

    def with_linear(self, linear: nn.Linear, x: Tensor, state: DomainState) -> Tensor:
        """The layer and :meth:`adapt`, for adapters that can do both in one go."""
        return self.adapt(F.linear(x, linear.weight, linear.bias), x, state)


class CombiningAdapter(LayerAdapter):
    """A layer adapter that weighs several parts for each row, and can say how.

    ``weights`` holds the weights of the last pass in evaluation mode, [B, K] for K parts; None where there are none.
    """

    weights: Tensor | None = None

    def keep(self, weights: Tensor) -> None:
        """Remembers the weights [B, K] of a pass in evaluation mode."""
        self.weights = None if self.training else weights


class LoRABank(Bank, LayerAdapter):
    """One low-rank adapter per domain: ``B_d A_d x + b_d`` (MLoRA, section 3; no activation, no alpha / r scaling).

    A is Glorot-initialised, B and b are zero, so that a new bank adds exactly zero. B and b lie in one parameter, since
    one product reads them: ``Bb`` [N, r + 1, out_features], the columns of B and, in the last row, b.

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
        >>> sum(p.numel() for p in bank.parameters())  # 3 * (2 * 8 + 4 * 2 + 4)
        84
    """

    def __init__(self, num_adapters: int, in_features: int, out_features: int, rank: int, division: int = 0) -> None:
        super().__init__(num_adapters, division)
        if min(in_features, out_features, rank) < 1:
            raise ValueError(f"in_features {in_features}, out_features {out_features} and rank {rank} must be positive")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.A = nn.Parameter(torch.empty(num_adapters, rank, in_features))
        self.Bb = nn.Parameter(torch.empty(num_adapters, rank + 1, out_features))
        self.reset_parameters()

    @property
    def B(self) -> Tensor:  # noqa: N802, the paper's letter
        """[N, out_features, r], a view of the parameter."""
        return self.Bb[:, :-1].mT

    @property
    def b(self) -> Tensor:
        """[N, out_features], a view of the parameter."""
        return self.Bb[:, -1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A anew and sets B and b to zero."""
        bound = (6.0 / (self.in_features + self.rank)) ** 0.5
        self.A.uniform_(-bound, bound)
        self.Bb.zero_()

    def up(self) -> Tensor:
        """[N, r + 1, out_features], what is applied after A, and the bias."""
        return self.Bb

    def forward(self, x: Tensor, groups: DomainGroups, first: int = 0, base: Tensor | None = None) -> Tensor:
        """The adapters' part for each row, added to base where that is given.

        Args:
            x (Tensor): [B, in_features].
            groups (DomainGroups): the adapter of each row.
            first (int): groups count from this adapter on: row i uses adapter first + ids[i].
            base (Tensor | None): [B, out_features].

        Returns:
            Tensor: [B, out_features], rows in x's order.
        """
        return grouped_low_rank(x, *self._weights(groups, first), groups, base)

    def adapted_linear(self, x: Tensor, linear: nn.Linear, groups: DomainGroups, first: int = 0) -> Tensor:
        """The adapters' part and the layer's own, as :meth:`forward` with the layer's output as base, but in one go."""
        return adapted_linear(x, linear.weight, linear.bias, *self._weights(groups, first), groups)

    def active(self, state: DomainState) -> ActiveBank:
        """Itself; see :meth:`LayerAdapter.active`."""
        return ActiveBank(self, state.groups(self.division))

    def _weights(self, groups: DomainGroups, first: int) -> tuple[Tensor, Tensor]:
        last = first + groups.num_adapters
        if last > self.num_adapters:
            raise ValueError(f"the groups name {last} adapters, the bank has {self.num_adapters}")
        if groups.num_adapters == self.num_adapters:  # a slice's backward would fill a gradient of all with zeros
            return self.A, self.up()
        return self.A[first:last], self.up()[first:last]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_adapters}, {self.in_features}, {self.out_features}, rank={self.rank}"
