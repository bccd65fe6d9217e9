"""Wide & Deep (Cheng et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, flat_width
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class WDLConfig(HiddenConfig):
    """Options of `wdl`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return WDL(
            build_tables(schema, embedding_dim),
            linear_arch=LinearArch.from_schema(schema),
            over_arch=self.over_arch(flat_width(schema, embedding_dim)),
        )


class WDL(Backbone):
    """The sum of a linear logit and an MLP's logit (Cheng et al. 2016, eq. 3), without hand-made cross features."""

    linear_arch: LinearArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        wide = self.linear_arch(dense_features, sparse_features)
        return wide + self.over_arch(flatten(self.sparse_arch(sparse_features), dense_features))
