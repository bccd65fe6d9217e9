"""Neural factorisation machine (He and Chua 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.config import HiddenConfig
from torchrec_mdr.backbones.layers import OverArch, bi_interaction, flatten
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
            LinearArch.from_schema(schema),
            self.over_arch(embedding_dim + len(schema.dense_features)),
        )


class NFM(nn.Module):
    """An MLP on bi-interaction pooling, beside a linear part (He and Chua 2017, eqs. 2 to 7).

    Args:
        embedding_bag_collection (EmbeddingBagCollection): F tables of one width D.
        linear_arch (LinearArch): the first order.
        over_arch (OverArch): takes D + num_dense features.
    """

    adapter_targets: ClassVar[tuple[str, ...]] = ("over_arch.hidden.*.linear",)

    def __init__(
        self, embedding_bag_collection: EmbeddingBagCollection, linear_arch: LinearArch, over_arch: OverArch
    ) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection)
        self.linear_arch = linear_arch
        self.over_arch = over_arch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        pooled = bi_interaction(self.sparse_arch(sparse_features))
        first_order = self.linear_arch(dense_features, sparse_features)
        return first_order + self.over_arch(flatten(pooled, dense_features))
