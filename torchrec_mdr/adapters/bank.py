"""Banks: the adapters of one layer for all domains, stacked in one tensor per role."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule, OwnedRows, ParameterGroup
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import Base, grouped_low_rank


class Bank(nn.Module, DomainModule):
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

    def trains_on(self, route: Route, division: int) -> bool:
        """Whether a stage on this route may train the bank."""
        return route is not Route.DOMAIN or self.division == division

    def rows_of_expert(self, expert_index: int, num_domains: int) -> slice:
        """The rows of one expert of every domain."""
        return slice(expert_index * num_domains, (expert_index + 1) * num_domains)

    def owned_rows(self, expert_index: int, num_domains: int) -> dict[str, OwnedRows]:
        """Rows of one expert of every domain, by the names of their tensors."""
        rows = self.rows_of_expert(expert_index, num_domains)
        return {
            role: OwnedRows(tensor.detach()[rows], torch.arange(num_domains, device=tensor.device))
            for role, tensor in self.row_tensors().items()
        }

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, num_domains: int) -> None:
        """See :class:`DomainModule`; an expert's rows of all domains lie together."""
        experts = self.num_adapters // num_domains
        parts = old.view(experts, -1, *old.shape[1:])
        new.view(experts, -1, *new.shape[1:])[:, : parts.shape[1]].copy_(parts)

    def factored_tables(self) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """Parameters whose gradients a backward pass can leave as factors, see :class:`FactorList`."""
        return []


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

    def __init__(self, num_adapters: int, in_features: int, out_features: int, rank: int, division: int = 0) -> None:
        super().__init__(num_adapters, division)
        if min(in_features, out_features, rank) < 1:
            raise ValueError(f"in_features {in_features}, out_features {out_features} and rank {rank} must be positive")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.lora_A = nn.Parameter(torch.empty(num_adapters, rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(num_adapters, rank, out_features).mT)
        self.bias = nn.Parameter(torch.empty(num_adapters, out_features))
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
        adapted: Tensor = self(x, state.groups(self.division), base, state.expert_index)
        return adapted

    def factored_tables(self) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
        """See :class:`Bank`: A's, and those of B and b together."""
        return [(self.lora_A, None), (self.lora_B, self.bias)]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_adapters}, {self.in_features}, {self.out_features}, rank={self.rank}"
