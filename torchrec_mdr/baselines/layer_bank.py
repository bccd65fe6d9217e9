"""Banks of whole layers: every domain has a layer of its own, full size, and only its own rows go through it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.adapters.domain_module import ParameterGroup
from torchrec_mdr.adapters.norm import NormBank
from torchrec_mdr.ops.grouped_linear import grouped_linear
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.tiles import Tiles


class LayerBank(Bank):
    """One layer per domain. They train with the backbone, of which they are a part."""

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.BACKBONE
    step_tensors: ClassVar[int] = 1  # the backward pass gives gradients of all domains at once

    @abstractmethod
    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, ...] through each row's own layer, rows in x's order."""

    @abstractmethod
    def copy_layer(self, layer: nn.Module, domains: Tensor | None = None) -> None:
        """Gives domains' layers, int64 or all, the values of one layer."""


class LinearBank(LayerBank):
    """One linear layer per domain, initialised like `nn.Linear`, each domain's with draws of its own.

    Args:
        num_adapters (int): N.
        in_features (int): width of the input.
        out_features (int): width of the output.
        bias (bool): whether the layers have one.
        division (int): the division whose domains the layers belong to.

    Example::

        >>> bank = LinearBank(num_adapters=3, in_features=8, out_features=4)
        >>> bank(torch.rand(5, 8), DomainGroups.from_ids(torch.tensor([0, 2, 2, 1, 0]), 3)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self, num_adapters: int, in_features: int, out_features: int, bias: bool = True, division: int = 0
    ) -> None:
        super().__init__(num_adapters, division)
        self.weight = nn.Parameter(torch.empty(num_adapters, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_adapters, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the layers anew."""
        bound = max(self.weight.shape[-1], 1) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @torch.no_grad()
    def copy_layer(self, layer: nn.Module, domains: Tensor | None = None) -> None:
        """See :class:`LayerBank`."""
        for name, values in layer.named_parameters():
            _copy_rows(getattr(self, name), values, domains)

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, ..., in_features] -> [B, ..., out_features]; see :func:`grouped_linear`."""
        return grouped_linear(x, self.weight, self.bias, groups)


class ModuleBank(LayerBank):
    """One layer of any kind per domain, for layers that treat each row by itself: cross nets, bilinear products, ...

    Rows are cut into tiles of one domain, and the layer's own forward runs over all tiles at once.

    Args:
        layer (nn.Module): takes and gives one tensor with rows along its first dimension; not changed.
        num_adapters (int): N.
        division (int): the division whose domains the layers belong to.

    Raises:
        ValueError: the layer keeps state that a forward pass changes, such as running statistics.
    """

    def __init__(self, layer: nn.Module, num_adapters: int, division: int = 0) -> None:
        super().__init__(num_adapters, division)
        kept = set(layer.state_dict()) - {name for name, _ in layer.named_parameters()}
        if kept:
            raise ValueError(
                f"a {type(layer).__name__} cannot be had once per domain: it keeps state, '{sorted(kept)[0]}'; take a "
                "layer without state, or nn.BatchNorm1d"
            )
        self.names = {name: name.replace(".", "_") for name, _ in layer.named_parameters()}
        for name, values in layer.named_parameters():
            rows = values.detach().expand(num_adapters, *values.shape)
            self.register_parameter(self.names[name], nn.Parameter(rows.clone()))
        # what is left of the layer without its parameters, which functional_call puts in
        self.layer = copy.deepcopy(layer)
        for module in self.layer.modules():
            module._parameters.clear()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives every domain's layer the initial values that its modules draw."""
        device = next(self.parameters()).device
        for row in range(self.num_adapters):
            layer = copy.deepcopy(self.layer)
            for name, own in self.names.items():
                holder, _, last = name.rpartition(".")
                values = torch.empty(self.get_parameter(own).shape[1:], device=device)
                layer.get_submodule(holder).register_parameter(last, nn.Parameter(values))
            for module in layer.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
            for name, own in self.names.items():
                self.get_parameter(own)[row] = layer.get_parameter(name)

    @torch.no_grad()
    def copy_layer(self, layer: nn.Module, domains: Tensor | None = None) -> None:
        """See :class:`LayerBank`."""
        for name, values in layer.named_parameters():
            _copy_rows(self.get_parameter(self.names[name]), values, domains)

    def forward(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """[B, ...] -> what the layer gives for it."""
        tiles = Tiles.of(groups.offsets, x.shape[0])
        owners = tiles.groups if groups.adapter_ids is None else groups.adapter_ids.index_select(0, tiles.groups)
        rows = {name: self.get_parameter(own).index_select(0, owners) for name, own in self.names.items()}
        run = vmap(lambda own, tile: functional_call(self.layer, own, (tile,)), randomness="different")
        y: Tensor = tiles.collect(run(rows, tiles.spread(groups.group(x))))
        return groups.ungroup(y)


class BackboneNormBank(NormBank):
    """A :class:`NormBank` that trains with the backbone."""

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.BACKBONE


class DomainLayer(nn.Module):
    """Takes a layer's place with one layer per domain.

    Args:
        bank (LayerBank): the domains' layers.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(self, bank: LayerBank, context: DomainContext) -> None:
        super().__init__()
        self.bank = bank
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] through each row's own layer."""
        y: Tensor = self.bank(x, self.context.state.groups(self.bank.division))
        return y


class PartitionedNorm(nn.Module):
    """Takes a batch norm's place with one per domain: statistics and affine parameters are the domain's own (STAR).

    Args:
        norm (nn.BatchNorm1d): whose values all domains start from.
        num_domains (int): N.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(self, norm: nn.BatchNorm1d, num_domains: int, context: DomainContext) -> None:
        super().__init__()
        self.bank = BackboneNormBank(num_domains, norm.num_features, 0, norm.eps, norm.momentum or 0.1)
        self.bank.copy_rows(norm.state_dict())
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_features] -> [B, num_features]."""
        y: Tensor = self.bank(x, self.context.state.groups(0))
        return y


def layer_bank(
    layer: nn.Module,
    num_adapters: int,
    linear_bank: type[LinearBank] = LinearBank,
    module_bank: type[ModuleBank] = ModuleBank,
) -> LayerBank:
    """One copy of a layer per domain.

    Args:
        layer (nn.Module): whose values all copies start from.
        num_adapters (int): N.
        linear_bank (type[LinearBank]): what a linear layer becomes.
        module_bank (type[ModuleBank]): what any other layer becomes.
    """
    if not isinstance(layer, nn.Linear):
        return module_bank(layer, num_adapters)
    bank = linear_bank(num_adapters, layer.in_features, layer.out_features, layer.bias is not None)
    bank.copy_layer(layer)
    return bank


def replace_layers(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces every layer below a module that has parameters of its own, except embedding tables, in place.

    Args:
        module (nn.Module): what holds the layers.
        replace (Callable): gives what takes a layer's place.

    Raises:
        ValueError: the module itself has parameters, outside any layer.
    """
    for name, _ in module.named_parameters(recurse=False):
        raise ValueError(
            f"{type(module).__name__} has a parameter '{name}' outside its layers, which cannot be had once per "
            "domain; put it into a module of its own"
        )
    for name, child in module.named_children():
        if isinstance(child, EmbeddingBagCollection | EmbeddingCollection):
            continue
        holders = [child, *(part for part in child.children() if isinstance(part, nn.ParameterList))]
        if any(True for holder in holders for _ in holder.parameters(recurse=False)):
            setattr(module, name, replace(child))
        else:
            replace_layers(child, replace)


def domain_layer(layer: nn.Module, num_domains: int, context: DomainContext) -> nn.Module:
    """What takes a layer's place where every domain has its own: copies of it that train with the backbone."""
    if isinstance(layer, nn.BatchNorm1d):
        return PartitionedNorm(layer, num_domains, context)
    return DomainLayer(layer_bank(layer, num_domains), context)


def _copy_rows(rows: Tensor, values: Tensor, domains: Tensor | None) -> None:
    """Sets rows, int64 or all, to the same values."""
    if domains is None:
        rows.copy_(values)
    else:
        rows[domains] = values
