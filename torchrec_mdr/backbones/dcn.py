"""Deep & Cross network (Wang et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.modules.crossnet import VectorCrossNet
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, check_positive, flat_width
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class DCNConfig(HiddenConfig):
    """Options of `dcn`.

    Args:
        hidden (tuple[int, ...]): widths of the hidden layers of the MLP part, the scoring layer not counted.
        dropout (float): share of a hidden layer's linear output that is dropped in training, in [0, 1).
        batch_norm (bool): whether each hidden layer normalises before its activation.
        num_cross_layers (int): cross layers.

    Raises:
        ValueError: no cross or hidden layer, a width below 1, or a dropout outside [0, 1).
    """

    num_cross_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("num_cross_layers", self.num_cross_layers)

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        width = flat_width(schema, embedding_dim)
        return DCN(
            build_tables(schema, embedding_dim),
            inter_arch=CrossArch(width, self.num_cross_layers),
            over_arch=self.over_arch(width),
        )


class DCN(Backbone):
    """A cross net and an MLP side by side, scored together (Wang et al. 2017, eqs. 2 to 5)."""

    inter_arch: CrossArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        features = flatten(self.sparse_arch(sparse_features), dense_features)
        return self.inter_arch(features) + self.over_arch(features)


class CrossArch(nn.Module):
    """TorchRec's vector cross net and its share of the score. The bias is the over arch's.

    Args:
        in_features (int): width of the input.
        num_layers (int): cross layers.
    """

    def __init__(self, in_features: int, num_layers: int) -> None:
        super().__init__()
        self.crossnet = VectorCrossNet(in_features, num_layers)
        self.output = nn.Linear(in_features, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        return self.output(self.crossnet(features))
