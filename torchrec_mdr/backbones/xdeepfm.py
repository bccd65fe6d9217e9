"""xDeepFM (Lian et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, check_layer_sizes, flat_width
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class XDeepFMConfig(HiddenConfig):
    """Options of `xdeepfm`.

    Args:
        hidden (tuple[int, ...]): widths of the hidden layers of the MLP part, the scoring layer not counted.
        dropout (float): share of a hidden layer's linear output that is dropped in training, in [0, 1).
        batch_norm (bool): whether each hidden layer normalises before its activation.
        cin_layer_sizes (tuple[int, ...]): feature maps of each layer of the compressed interaction network, even but
            for the last, since half of a layer's maps go on to the next one and the other half to the score.

    Raises:
        ValueError: no layer, a width below 1, an odd number of maps to split, or a dropout outside [0, 1).
    """

    cin_layer_sizes: tuple[int, ...] = (128, 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_sizes("cin_layer_sizes", self.cin_layer_sizes)
        if any(size % 2 for size in self.cin_layer_sizes[:-1]):
            raise ValueError(f"cin_layer_sizes must be even but for the last, not {list(self.cin_layer_sizes)}")

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return XDeepFM(
            build_tables(schema, embedding_dim),
            linear_arch=LinearArch.from_schema(schema),
            inter_arch=CIN(len(schema.sparse_features), self.cin_layer_sizes),
            over_arch=self.over_arch(flat_width(schema, embedding_dim)),
        )


class XDeepFM(Backbone):
    """Linear part, compressed interaction network and MLP, summed (Lian et al. 2018, eq. 9)."""

    linear_arch: LinearArch
    inter_arch: CIN

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        embeddings = self.sparse_arch(sparse_features)
        linear = self.linear_arch(dense_features, sparse_features)
        return linear + self.inter_arch(embeddings) + self.over_arch(flatten(embeddings, dense_features))


class CIN(nn.Module):
    """The compressed interaction network and its share of the score (eqs. 6 to 8, identity as activation).

    Args:
        num_features (int): F.
        layer_sizes (Sequence[int]): feature maps of each layer, even but for the last.
    """

    def __init__(self, num_features: int, layer_sizes: Sequence[int]) -> None:
        super().__init__()
        self.carried = [size // 2 for size in layer_sizes[:-1]]
        inputs = [num_features, *self.carried]
        self.layers = nn.ModuleList(
            nn.Linear(width * num_features, size, bias=False) for width, size in zip(inputs, layer_sizes, strict=True)
        )
        self.output = nn.Linear(sum(self.carried) + layer_sizes[-1], 1, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, D] -> logits [B, 1]."""
        # features last, so that a layer is one matrix product
        base = embeddings.transpose(1, 2)
        maps, pooled = base, []
        for layer, carried in zip(self.layers, [*self.carried, 0], strict=True):
            outer = maps.unsqueeze(3) * base.unsqueeze(2)
            produced = layer(outer.flatten(2))
            maps, scored = produced[..., :carried], produced[..., carried:]
            pooled.append(scored.sum(dim=1))
        return self.output(torch.cat(pooled, dim=1))
