"""Product-based network with inner products (Qu et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, flat_width
from torchrec_mdr.backbones.layers import flatten, pairs
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class PNNConfig(HiddenConfig):
    """Options of `pnn`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        num_features = len(schema.sparse_features)
        return PNN(
            build_tables(schema, embedding_dim),
            inter_arch=InnerProductArch(num_features),
            over_arch=self.over_arch(flat_width(schema, embedding_dim) + comb(num_features, 2)),
        )


class PNN(Backbone):
    """Flat embeddings and the inner products of their pairs through an MLP (Qu et al. 2016, eqs. 2 to 5, IPNN).

    The paper's l_z and l_p are the first layer's product with the embeddings and with the inner products.
    """

    inter_arch: InnerProductArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        return self.over_arch(flatten(self.inter_arch(self.sparse_arch(sparse_features)), dense_features))


class InnerProductArch(nn.Module):
    """Puts the inner product of every pair of features beside the flat embeddings.

    Args:
        num_features (int): F.
    """

    positions: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        first, _ = pairs(num_features)
        self.register_buffer("positions", first, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the positions, in memory that may come from the meta device."""
        first, second = pairs(self.num_features)
        self.positions.copy_(first * self.num_features + second)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, D] -> [B, F * D + F * (F - 1) / 2]."""
        products = torch.bmm(embeddings, embeddings.transpose(1, 2)).flatten(1)
        return torch.cat((embeddings.flatten(1), products.index_select(1, self.positions)), dim=1)
