"""TorchRec's low-rank cross net with adapters beside its cross matrices."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_mdr.adapters.bank import LayerAdapter
from torchrec_mdr.adapters.context import DomainContext, Route


class AdapterCrossNet(LowRankCrossNet):
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
        self.W_kernels = crossnet.W_kernels
        self.V_kernels = crossnet.V_kernels
        self.bias = crossnet.bias
        width = crossnet.bias[0].numel()
        self.adapters = nn.ModuleList(make_adapter(width, width) for _ in range(self._num_layers))
        self.context = context
        self.train(crossnet.training)

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_features] -> [B, in_features], by the route of the pass under way."""
        state = self.context.state
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
