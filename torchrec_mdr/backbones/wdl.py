"""Wide & Deep (Cheng et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.config import HiddenConfig, flat_width
from torchrec_mdr.backbones.layers import OverArch, flatten
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
            LinearArch.from_schema(schema),
            self.over_arch(flat_width(schema, embedding_dim)),
        )


class WDL(nn.Module):
    """The sum of a linear logit and an MLP's logit (Cheng et al. 2016, eq. 3), without hand-made cross features.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): F tables of one width D.
        linear_arch (LinearArch): the wide part.
        over_arch (OverArch): the deep part, takes F * D + num_dense features.
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
        wide = self.linear_arch(dense_features, sparse_features)
        return wide + self.over_arch(flatten(self.sparse_arch(sparse_features), dense_features))
