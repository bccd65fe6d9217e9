"""Neural factorisation machine (He and Chua 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig
from torchrec_mdr.backbones.layers import bi_interaction, flatten
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class NFMConfig(HiddenConfig):
    """Options of `nfm`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return NFM(
            build_tables(schema, embedding_dim),
            linear_arch=LinearArch.from_schema(schema),
            over_arch=self.over_arch(embedding_dim + len(schema.dense_features)),
        )


class NFM(Backbone):
    """An MLP on bi-interaction pooling, beside a linear part (He and Chua 2017, eqs. 2 to 7)."""

    linear_arch: LinearArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        pooled = bi_interaction(self.sparse_arch(sparse_features))
        first_order = self.linear_arch(dense_features, sparse_features)
        return first_order + self.over_arch(flatten(pooled, dense_features))
