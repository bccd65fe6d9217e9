"""A linear layer with adapters beside it."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.bank import LayerAdapter, LoRABank
from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.dropout import FastDropout
from torchrec_mdr.adapters.merging import AdaptedLayer, Merging
from torchrec_mdr.adapters.served import ServedLinear
from torchrec_mdr.ops.groups import DomainGroups
from torchrec_mdr.ops.low_rank import LinearWeights


class AdapterLinear(nn.Linear, AdaptedLayer):
    """``dropout(W x + b)`` plus what the adapters of the rows' domains add (MLoRA, section 3).

    The base parameters keep the names ``weight`` and ``bias``, so a checkpoint of the plain layer loads.

    Args:
        linear (nn.Linear): the base layer; its parameters are shared, not copied.
        adapter (LayerAdapter): a :class:`LoRABank`, or a method's combination of banks.
        dropout (float): dropout on the base layer's output, before the adapters' part is added.
        context (DomainContext | None): where forward finds the rows' domains; one of its own where left out.

    Example::

        >>> bank = LoRABank(num_adapters=2, in_features=8, out_features=4, rank=2)
        >>> linear = nn.Linear(8, 4)
        >>> layer = AdapterLinear.from_linear(linear, bank)
        >>> x, groups = torch.rand(3, 8), DomainGroups.from_ids(torch.tensor([1, 0, 1]), 2)
        >>> torch.equal(layer.adapted(x, groups), linear(x))  # a new bank adds zero
        True
    """

    def __init__(
        self, linear: nn.Linear, adapter: LayerAdapter, dropout: float = 0.0, context: DomainContext | None = None
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.adapter = adapter
        self.dropout = FastDropout(dropout)
        self.context = context or DomainContext()
        self.train(linear.training)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, adapter: LayerAdapter, dropout: float = 0.0, context: DomainContext | None = None
    ) -> AdapterLinear:
        """Puts adapters beside an existing layer.

        Raises:
            ValueError: a bank's widths are not the layer's.
        """
        for bank in adapter.modules():
            if isinstance(bank, LoRABank) and (bank.in_features, bank.out_features) != (
                linear.in_features,
                linear.out_features,
            ):
                raise ValueError(
                    f"a bank for {bank.in_features} -> {bank.out_features} cannot stand beside a layer "
                    f"{linear.in_features} -> {linear.out_features}"
                )
        return cls(linear, adapter, dropout, context)

    def adapted(self, x: Tensor, groups: DomainGroups) -> Tensor:
        """The layer with one bank's adapters, without a context: what :meth:`forward` does inside the pass.

        Args:
            x (Tensor): [B, in_features].
            groups (DomainGroups): the adapter of each row.

        Returns:
            Tensor: [B, out_features], rows in x's order.
        """
        assert isinstance(self.adapter, LoRABank), "only a single bank can be asked for its rows without a context"
        y: Tensor = self.adapter(x, groups, self._base(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., in_features] -> [B, ..., out_features], by the route of the pass under way.

        Raises:
            ValueError: the input's first dimension is not the batch.
        """
        state = self.enter()
        if state.route is Route.BASE:
            return self._output(x)
        if isinstance(x, torch.fx.Proxy):
            return self.adapter.adapt(x, self._base(x), state)
        rows = state.domains.ids.shape[0]
        if not torch.compiler.is_compiling() and x.shape[0] != rows:
            raise ValueError(
                f"an adapted layer {self.in_features} -> {self.out_features} got an input {list(x.shape)}, but the "
                f"batch has {rows} rows; adapters need the batch's rows as the input's first dimension, so leave the "
                "layer out of target_modules, or put the rows first"
            )
        if x.dim() == 2:
            return self.adapter.adapt(x, self._base(x), state)
        shape = x.shape[:-1]
        flat, state = x.reshape(-1, self.in_features), state.spread(prod(shape[1:]))
        return self.adapter.adapt(flat, self._base(flat), state).unflatten(0, shape)

    def freeze(self, route: Route) -> nn.Module:
        """See :class:`AdaptedLayer`."""
        return ServedLinear(self, self.adapter.freeze(route))

    @torch.no_grad()
    def merge(self, merging: Merging) -> nn.Module:
        """See :class:`AdaptedLayer`: the product of what is added goes into the weight, its bias into the bias."""
        part = self.adapter.merge(merging)
        merged = nn.Linear(self.in_features, self.out_features, device="meta")
        bias = part.bias if self.bias is None else self.bias.double() + part.bias
        merged.weight = nn.Parameter((self.weight.double() + part.up.mT @ part.down).to(self.weight.dtype))
        merged.bias = nn.Parameter(bias.to(self.weight.dtype))
        return merged.train(self.training)

    def _output(self, x: Tensor) -> Tensor:
        """The layer without adapters."""
        y: Tensor = self.dropout(F.linear(x, self.weight, self.bias))
        return y

    def _base(self, x: Tensor) -> Tensor | LinearWeights:
        """What adapters add to: the layer, or its output where dropout stands in between."""
        drops = self.dropout.p > 0.0 and self.dropout.training
        return self._output(x) if drops else LinearWeights(self.weight, self.bias)
