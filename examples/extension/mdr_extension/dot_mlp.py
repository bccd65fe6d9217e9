"""A backbone: an MLP on the embeddings and their dot products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import InteractionArch, SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones import HiddenConfig, build_tables
from torchrec_mdr.backbones.layers import OverArch
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class DotMLPConfig(HiddenConfig):
    """Options of `dot_mlp`: those of its hidden layers."""

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        tables, count, dense = len(schema.sparse_features), len(schema.sparse_features) + 1, len(schema.dense_features)
        width = embedding_dim + count * (count - 1) // 2
        collection = build_tables(schema, embedding_dim)
        return DotMLP(collection, nn.Linear(dense, embedding_dim), InteractionArch(tables), self.over_arch(width))


class DotMLP(nn.Module):
    """TorchRec's dot interaction of F embeddings and the projected dense features, then hidden layers."""

    adapter_targets: ClassVar[tuple[str, ...]] = ("over_arch.hidden.*.linear",)

    def __init__(
        self, tables: EmbeddingBagCollection, dense_arch: nn.Linear, inter_arch: InteractionArch, over_arch: OverArch
    ) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(tables)
        self.dense_arch = dense_arch
        self.inter_arch = inter_arch
        self.over_arch = over_arch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        dense = torch.relu(self.dense_arch(dense_features))
        logits: Tensor = self.over_arch(self.inter_arch(dense, self.sparse_arch(sparse_features)))
        return logits
