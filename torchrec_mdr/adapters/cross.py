"""TorchRec's low-rank cross net with adapters beside its cross matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_mdr.adapters.bank import LayerAdapter
from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.merging import AdaptedLayer, Merging
from torchrec_mdr.adapters.served import ServedAdapter


class ResetList(nn.ParameterList):
    """A parameter list that can draw initial values anew, for models that come from the meta device.

    Args:
        values (Iterable[nn.Parameter]): shared, not copied.
        init (Callable): sets one parameter's initial values, in place.
    """

    def __init__(self, values: Iterable[nn.Parameter], init: Callable[[Tensor], Tensor]) -> None:
        super().__init__(values)
        self.init = init

    def reset_parameters(self) -> None:
        """Sets all of them to initial values."""
        for parameter in self.parameters():
            self.init(parameter)


class AdapterCrossNet(LowRankCrossNet, AdaptedLayer):
    """DCNv2's cross net where each layer's matrix ``W V`` becomes ``W V + B_d A_d`` for a row of domain d.

    The base parameters keep their names, so a checkpoint of the plain cross net loads.

    Args:
        crossnet (LowRankCrossNet): the base net; its parameters are shared, not copied.
        make_adapter (Callable): called as make_adapter(in_features, out_features) once a layer.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(
        self, crossnet: LowRankCrossNet, make_adapter: Callable[[int, int], LayerAdapter], context: DomainContext
    ) -> None:
        nn.Module.__init__(self)  # LowRankCrossNet's own would draw parameters that are thrown away
        self._num_layers = crossnet._num_layers
        self._low_rank = crossnet._low_rank
        self.W_kernels = ResetList(crossnet.W_kernels, nn.init.xavier_normal_)
        self.V_kernels = ResetList(crossnet.V_kernels, nn.init.xavier_normal_)
        self.bias = ResetList(crossnet.bias, nn.init.zeros_)
        width = crossnet.bias[0].numel()
        self.adapters = nn.ModuleList(make_adapter(width, width) for _ in range(self._num_layers))
        self.context = context
        self.train(crossnet.training)

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_features] -> [B, in_features], by the route of the pass under way."""
        state = self.enter()
        if state.route is Route.BASE:
            crossed: Tensor = super().forward(input)
            return crossed
        x = input
        for layer, adapter in enumerate(self.adapters):
            assert isinstance(adapter, LayerAdapter)
            low = F.linear(x, self.V_kernels[layer])
            base = F.linear(low, self.W_kernels[layer]) + self.bias[layer]
            x = input * adapter.adapt(x, base, state) + x
        return x

    def freeze(self, route: Route) -> nn.Module:
        """See :class:`AdaptedLayer`."""
        adapters = [adapter for adapter in self.adapters if isinstance(adapter, LayerAdapter)]
        return ServedCrossNet(self, [adapter.freeze(route) for adapter in adapters])

    @torch.no_grad()
    def merge(self, merging: Merging) -> nn.Module:
        """See :class:`AdaptedLayer`: W and V grow by what the adapters apply, so that the form stays.

        All matrices of a cross net are of one rank: those of a layer that needs less are filled up with zeros.
        """
        adapters = [adapter for adapter in self.adapters if isinstance(adapter, LayerAdapter)]
        parts = [adapter.merge(merging) for adapter in adapters]
        width, added = self.bias[0].numel(), max(len(part.down) for part in parts)
        merged = LowRankCrossNet(width, self._num_layers, self._low_rank + added)
        for layer, (down, up, bias) in enumerate(parts):
            room = down.new_zeros(added - len(down), width)
            dtype = self.bias[layer].dtype
            down, up = torch.cat([down, room]), torch.cat([up, room])
            merged.V_kernels[layer] = nn.Parameter(torch.cat([self.V_kernels[layer], down.to(dtype)]))
            merged.W_kernels[layer] = nn.Parameter(torch.cat([self.W_kernels[layer], up.mT.to(dtype)], 1))
            merged.bias[layer] = nn.Parameter((self.bias[layer].double() + bias).to(dtype))
        return merged.train(self.training)


class ServedCrossNet(nn.Module):
    """A cross net as it serves.

    Args:
        crossnet (LowRankCrossNet): its weights are copied.
        adapters (list[ServedAdapter]): what stands beside each layer.
    """

    def __init__(self, crossnet: LowRankCrossNet, adapters: list[ServedAdapter]) -> None:
        super().__init__()
        self.W_kernels = _copied(crossnet.W_kernels)
        self.V_kernels = _copied(crossnet.V_kernels)
        self.bias = _copied(crossnet.bias)
        self.adapters = nn.ModuleList(adapters)

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_features] -> [B, in_features]."""
        x = input
        for layer, adapter in enumerate(self.adapters):
            low = F.linear(x, self.V_kernels[layer])
            base = F.linear(low, self.W_kernels[layer]) + self.bias[layer]
            x = input * adapter(x, base) + x
        return x


def _copied(weights: nn.ParameterList) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in weights])
