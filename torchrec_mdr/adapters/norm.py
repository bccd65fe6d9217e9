"""Batch normalisation whose statistics agree over ranks, shared by all rows or per domain."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.adapters.merging import AdaptedLayer, Merging
from torchrec_mdr.adapters.served import ServedNorm
from torchrec_mdr.ops import cpu_kernels as compiled
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.norms import normalise_by_domain


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the rows of all ranks, on CPU as well (SyncBatchNorm refuses CPU).

    State and results are those of one rank that sees the whole global batch.

    Example::

        >>> norm = GlobalBatchNorm1d(4)
        >>> norm(torch.rand(8, 4)).shape
        torch.Size([8, 4])
    """

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """[B, num_features] -> [B, num_features], with a ReLU behind if wanted."""
        if self._is_plain(input):
            y = self._as_it_stands(input) if not self.training else super().forward(input)
            return torch.relu_(y) if relu else y
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        groups = DomainGroups.of_one(input.shape[0], input.device)
        affine = self.weight.unsqueeze(0), self.bias.unsqueeze(0)
        running = self.running_mean.unsqueeze(0), self.running_var.unsqueeze(0)
        return normalise_by_domain(input, groups, *affine, *running, self.eps, self.momentum, self.training, relu)

    def _as_it_stands(self, input: Tensor) -> Tensor:
        """[B, num_features] by the running statistics."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _is_plain(self, input: Tensor) -> bool:
        """Whether PyTorch's own kernel gives the same, and is best."""
        if not self.training:
            return torch.compiler.is_compiling() or not compiled.is_supported(input)
        if dist.is_initialized() and dist.get_world_size() > 1:
            return False
        # which refuses a batch of one row; ours normalises that by the running statistics
        return not torch.compiler.is_compiling() and not compiled.is_supported(input) and input.shape[0] > 1


class NormBank(Bank):
    """Affine parameters and running statistics of one batch normalisation per domain (STAR's, as MultiLoRA uses it).

    In training a row is normalised by the statistics of its own domain's rows in the global batch; a domain with one
    row in it by its running statistics.

    Args:
        num_adapters (int): N, number of domains.
        num_features (int): width.
        division (int): the division whose domains are normalised.
        eps (float): added to variances.
        momentum (float): share of the batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_adapters: int, num_features: int, division: int = 0, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_adapters, division)
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_adapters, num_features))
        self.bias = nn.Parameter(torch.empty(num_adapters, num_features))
        self.register_buffer("running_mean", torch.empty(num_adapters, num_features))
        self.register_buffer("running_var", torch.empty(num_adapters, num_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets scales and variances to one, shifts and means to zero."""
        for tensor, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
            tensor.fill_(value)

    @torch.no_grad()
    def copy_rows(self, source: dict[str, Tensor], rows: Tensor | None = None) -> None:
        """Sets rows, int64 or all, from tensors of the same names, [num_features] or [N, num_features]."""
        for name, own in self.row_tensors().items():
            values = source[name].expand_as(own)
            if rows is None:
                own.copy_(values)
            else:
                own[rows] = values[rows]

    def forward(self, x: Tensor, groups: DomainGroups, relu: bool = False) -> Tensor:
        """Normalises each row by its own domain.

        Args:
            x (Tensor): [B, num_features].
            groups (DomainGroups): the domain of each row.
            relu (bool): whether a ReLU follows.

        Returns:
            Tensor: [B, num_features].
        """
        return self.normalise(x, groups, self.weight, self.bias, relu)

    def normalise(self, x: Tensor, groups: DomainGroups, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
        """The same with affine parameters [N, num_features] that are not the bank's own, or not alone."""
        statistics = self.running_mean, self.running_var, self.eps, self.momentum, self.training
        return normalise_by_domain(x, groups, weight, bias, *statistics, relu)

    def as_product(self) -> tuple[Tensor, Tensor]:
        """The norms by their running statistics as a product and a sum, [N, num_features] each."""
        return _as_product(self.row_tensors(), self.eps)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_adapters}, {self.weight.shape[1]}, division={self.division}"


class CombinationNormBank(NormBank):
    """A :class:`NormBank` with one row per combination of domains, for the fused path; the last division is fastest.

    Args:
        sizes (list[int]): number of domains of each division.
        num_features (int): width.
        eps (float): added to variances.
        momentum (float): share of the batch in the running statistics.
    """

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.GATE

    def __init__(self, sizes: list[int], num_features: int, eps: float, momentum: float) -> None:
        super().__init__(prod(sizes), num_features, 0, eps, momentum)
        self.sizes = sizes

    def _ids(self, state: DomainState) -> Tensor:
        """The rows' combinations, int64 [B]; -1 where a domain is unknown."""
        divisions = [state.groups(division) for division in range(len(self.sizes))]
        ids = divisions[0].ids
        for groups in divisions[1:]:
            ids = ids * groups.num_adapters + groups.ids
        if any(groups.may_miss for groups in divisions):
            known = torch.stack([groups.ids >= 0 for groups in divisions]).all(0)
            ids = torch.where(known, ids, -1)
        return ids

    def groups(self, state: DomainState) -> DomainGroups:
        """The rows by their combination; computed once a pass for all norms of a model."""
        if "combinations" not in state.cache:
            # the loader's order, in which no row has to move, is that of the combinations
            in_order = state.groups(0).permutation is None
            make = DomainGroups.from_sorted_ids if in_order else DomainGroups.from_ids
            state.cache["combinations"] = make(self._ids(state), self.num_adapters)
        groups: DomainGroups = state.cache["combinations"]
        return groups

    def owners(self, num_domains: int) -> Tensor:
        """See :class:`Bank`: the domains of the first division."""
        return torch.arange(self.num_adapters) // (self.num_adapters // num_domains)

    def rows_of(self, domains: Tensor) -> Tensor:
        """The combinations that some domains of the first division are in."""
        others = self.num_adapters // self.sizes[0]
        return (domains.unsqueeze(1) * others + torch.arange(others, device=domains.device)).flatten()

    def load_old_domains(self, name: str, old: Tensor, new: Tensor, sources: Tensor) -> None:
        """See :class:`DomainModule`: the first division is the slowest."""
        known, others = sources >= 0, len(new) // len(sources)
        new.view(-1, others, *new.shape[1:])[known] = old.view(-1, others, *old.shape[1:])[sources[known]].to(new)


class DomainNorm(GlobalBatchNorm1d, DomainModule, AdaptedLayer):
    """Takes a batch norm's place: the norm itself, one per domain, or one per combination (MultiLoRA, Eq. 9 and 11).

    The base norm's state keeps its names.

    Args:
        norm (nn.BatchNorm1d): the backbone's norm.
        sizes (list[int]): number of domains of each division.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(self, norm: nn.BatchNorm1d, sizes: list[int], context: DomainContext) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        momentum = 0.1 if norm.momentum is None else norm.momentum
        self.context = context
        self.domains = nn.ModuleList(
            NormBank(size, norm.num_features, division, norm.eps, momentum) for division, size in enumerate(sizes)
        )
        self.combinations: CombinationNormBank | None = None
        if len(sizes) > 1:
            self.combinations = CombinationNormBank(sizes, norm.num_features, norm.eps, momentum)
        for division in range(len(sizes)):
            self.start_stage(Route.DOMAIN, division)  # a norm may come trained
        self.start_stage(Route.FUSED, 0)
        self.train(norm.training)

    def start_stage(self, route: Route, division: int, domains: Tensor | None = None) -> None:
        """See :class:`DomainModule`: norms start from the base norm's state, fused ones from the first division's."""
        if route is Route.DOMAIN:
            bank = self.domains[division]
            assert isinstance(bank, NormBank)
            base = {name: tensor for name, tensor in self.state_dict().items() if name in bank.row_tensors()}
            bank.copy_rows(base, domains)
        elif route is Route.FUSED and self.combinations is not None:
            first = self.domains[0]
            assert isinstance(first, NormBank)
            per_domain = self.combinations.num_adapters // first.num_adapters
            rows = {name: t.repeat_interleave(per_domain, 0) for name, t in first.row_tensors().items()}
            self.combinations.copy_rows(rows, None if domains is None else self.combinations.rows_of(domains))

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """[B, num_features] -> [B, num_features], by the route of the pass under way."""
        state = self.enter()
        if state.route is Route.BASE:
            return super().forward(input, relu)
        bank = self._bank(state.route, state.division)
        groups = bank.groups(state) if isinstance(bank, CombinationNormBank) else state.groups(bank.division)
        normed: Tensor = bank(input, groups, relu)
        if groups.may_miss:  # rows of unknown domains go by the base norm, as it stands
            base = self._as_it_stands(input)
            normed = torch.where((groups.ids >= 0).unsqueeze(1), normed, torch.relu(base) if relu else base)
        return normed

    def freeze(self, route: Route) -> nn.Module:
        """See :class:`AdaptedLayer`."""
        bank = self._bank(route)
        sizes = bank.sizes if isinstance(bank, CombinationNormBank) else [bank.num_adapters]
        products = [t.unflatten(0, (sizes[0], -1)) if len(sizes) > 1 else t for t in bank.as_product()]
        return ServedNorm(products[0], products[1], _as_product(self.state_dict(), self.eps), sizes)

    @torch.no_grad()
    def merge(self, merging: Merging) -> nn.Module:
        """See :class:`AdaptedLayer`: a norm with the tensors of the domain, or of the combination."""
        bank = self._bank(merging.route)
        row, domains = merging.domains[bank.division], merging.domains[bank.division : bank.division + 1]
        if isinstance(bank, CombinationNormBank):
            row, domains = 0, merging.domains
            for domain, size in zip(domains, bank.sizes, strict=True):
                row = row * size + domain
        norm = GlobalBatchNorm1d(self.num_features, self.eps, self.momentum, device=self.weight.device)
        norm = norm.to(self.weight.dtype)
        known = min(domains) >= 0
        own = {name: tensor[row] for name, tensor in bank.row_tensors().items()} if known else self.state_dict()
        norm.load_state_dict({name: own.get(name, tensor) for name, tensor in norm.state_dict().items()})
        return norm.train(self.training)

    def _bank(self, route: Route, division: int = 0) -> NormBank:
        """The norms of a route."""
        if route is Route.FUSED and self.combinations is not None:
            return self.combinations
        bank = self.domains[division if route is Route.DOMAIN else 0]
        assert isinstance(bank, NormBank)
        return bank


def _as_product(state: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """``x * scale + shift``, the same as a norm by its running statistics."""
    wanted = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (state[name].detach().double() for name in wanted)
    scale = weight / (var + eps).sqrt()
    dtype = state["weight"].dtype
    return scale.to(dtype), (bias - mean * scale).to(dtype)
