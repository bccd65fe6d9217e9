"""The plain MLP on flat embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.config import HiddenConfig, flat_width
from torchrec_mdr.backbones.layers import OverArch, flatten
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class MLPConfig(HiddenConfig):
    """Options of `mlp`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return MLP(build_tables(schema, embedding_dim), self.over_arch(flat_width(schema, embedding_dim)))


class MLP(nn.Module):
    """Flat embeddings and dense features through an MLP.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): F tables of one width D.
        over_arch (OverArch): takes F * D + num_dense features.
    """

    adapter_targets: ClassVar[tuple[str, ...]] = ("over_arch.hidden.*.linear",)

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection, over_arch: OverArch) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection)
        self.over_arch = over_arch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        return self.over_arch(flatten(self.sparse_arch(sparse_features), dense_features))
