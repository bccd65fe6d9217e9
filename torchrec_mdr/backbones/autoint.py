"""AutoInt+ (Song et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, check_positive, flat_width
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class AutoIntConfig(HiddenConfig):
    """Options of `autoint`.

    Args:
        hidden (tuple[int, ...]): widths of the hidden layers of the MLP part, the scoring layer not counted.
        dropout (float): share of a hidden layer's linear output that is dropped in training, in [0, 1).
        batch_norm (bool): whether each hidden layer normalises before its activation.
        num_layers (int): layers of self-attention.
        num_heads (int): heads of each.
        head_dim (int): width of a head.

    Raises:
        ValueError: a count or width below 1, no hidden layer, or a dropout outside [0, 1).
    """

    num_layers: int = 3
    num_heads: int = 4
    head_dim: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("num_layers", self.num_layers)
        check_positive("num_heads", self.num_heads)
        check_positive("head_dim", self.head_dim)

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        num_features = len(schema.sparse_features)
        return AutoInt(
            build_tables(schema, embedding_dim),
            inter_arch=AttentionArch(num_features, embedding_dim, self.num_layers, self.num_heads, self.head_dim),
            over_arch=self.over_arch(flat_width(schema, embedding_dim)),
        )


class AutoInt(Backbone):
    """Self-attention over the features' embeddings, with an MLP beside it (Song et al. 2019, "AutoInt+")."""

    inter_arch: AttentionArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        embeddings = self.sparse_arch(sparse_features)
        return self.inter_arch(embeddings) + self.over_arch(flatten(embeddings, dense_features))


class AttentionArch(nn.Module):
    """Layers of self-attention, then a score of all features' outputs. The bias is the over arch's.

    Args:
        num_features (int): F.
        embedding_dim (int): D.
        num_layers (int): layers.
        num_heads (int): heads a layer.
        head_dim (int): width of a head.
    """

    def __init__(self, num_features: int, embedding_dim: int, num_layers: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.layers = nn.Sequential(
            *(SelfAttention(width if i else embedding_dim, num_heads, head_dim) for i in range(num_layers))
        )
        self.output = nn.Linear(num_features * width, 1, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, D] -> logits [B, 1]."""
        return self.output(self.layers(embeddings).flatten(1))


class SelfAttention(nn.Module):
    """An interacting layer: attention over the features, its scores not scaled, and a residual (eqs. 5 to 8).

    Args:
        in_features (int): width of each feature's input.
        num_heads (int): H.
        head_dim (int): K.
    """

    def __init__(self, in_features: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads = num_heads
        self.query = nn.Linear(in_features, width, bias=False)
        self.key = nn.Linear(in_features, width, bias=False)
        self.value = nn.Linear(in_features, width, bias=False)
        self.residual = nn.Linear(in_features, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, F, in_features] -> [B, F, H * K]."""
        query, key, value = (
            projection(features).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return torch.relu(attended.transpose(1, 2).flatten(2) + self.residual(features))
