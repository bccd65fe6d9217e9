"""DeepFM (Guo et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, flat_width
from torchrec_mdr.backbones.layers import bi_interaction, flatten
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class DeepFMConfig(HiddenConfig):
    """Options of `deepfm`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return DeepFM(
            build_tables(schema, embedding_dim),
            linear_arch=LinearArch.from_schema(schema),
            over_arch=self.over_arch(flat_width(schema, embedding_dim)),
        )


class DeepFM(Backbone):
    """A factorisation machine and an MLP on the same embeddings (Guo et al. 2017, eqs. 1, 2 and 4).

    TorchRec's `FactorizationMachine` is not used: it pairs every scalar of the embeddings with every other.
    """

    linear_arch: LinearArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        embeddings = self.sparse_arch(sparse_features)
        first_order = self.linear_arch(dense_features, sparse_features)
        second_order = bi_interaction(embeddings).sum(dim=1, keepdim=True)
        return first_order + second_order + self.over_arch(flatten(embeddings, dense_features))
