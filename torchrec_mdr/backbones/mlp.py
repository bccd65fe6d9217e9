"""The plain MLP on flat embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, flat_width
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class MLPConfig(HiddenConfig):
    """Options of `mlp`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return MLP(build_tables(schema, embedding_dim), over_arch=self.over_arch(flat_width(schema, embedding_dim)))


class MLP(Backbone):
    """Flat embeddings and dense features through an MLP."""

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        return self.over_arch(flatten(self.sparse_arch(sparse_features), dense_features))
