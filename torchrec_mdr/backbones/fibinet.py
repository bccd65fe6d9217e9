"""FiBiNET (Huang et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.base import Backbone
from torchrec_mdr.backbones.config import HiddenConfig, check_positive
from torchrec_mdr.backbones.layers import flatten, pairs
from torchrec_mdr.backbones.linear import LinearArch
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class FiBiNETConfig(HiddenConfig):
    """Options of `fibinet`.

    Args:
        hidden (tuple[int, ...]): widths of the hidden layers of the MLP part, the scoring layer not counted.
        dropout (float): share of a hidden layer's linear output that is dropped in training, in [0, 1).
        batch_norm (bool): whether each hidden layer normalises before its activation.
        reduction (int): by how much SENET's inner layer is narrower than the number of features.

    Raises:
        ValueError: a reduction or width below 1, no hidden layer, or a dropout outside [0, 1).
    """

    reduction: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("reduction", self.reduction)

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`.

        Raises:
            ValueError: fewer than two sparse features, so that there is no pair.
        """
        num_features = len(schema.sparse_features)
        if num_features < 2:
            raise ValueError(f"backbone fibinet needs two sparse features, data set '{schema.dataset}' has one")
        return FiBiNET(
            build_tables(schema, embedding_dim),
            linear_arch=LinearArch.from_schema(schema),
            inter_arch=BilinearArch(num_features, embedding_dim, self.reduction),
            over_arch=self.over_arch(2 * comb(num_features, 2) * embedding_dim + len(schema.dense_features)),
        )


class FiBiNET(Backbone):
    """Bilinear products of plain and of reweighted embeddings through an MLP, beside a linear part.

    Huang et al. 2019, eqs. 1 to 13.
    """

    linear_arch: LinearArch
    inter_arch: BilinearArch

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        products = self.inter_arch(self.sparse_arch(sparse_features))
        first_order = self.linear_arch(dense_features, sparse_features)
        return first_order + self.over_arch(flatten(products, dense_features))


class BilinearArch(nn.Module):
    """SENET, then the bilinear products of the embeddings before and after it.

    Args:
        num_features (int): F.
        embedding_dim (int): D.
        reduction (int): SENET's.
    """

    def __init__(self, num_features: int, embedding_dim: int, reduction: int) -> None:
        super().__init__()
        self.senet = SENET(num_features, reduction)
        self.plain = BilinearInteraction(num_features, embedding_dim)
        self.reweighted = BilinearInteraction(num_features, embedding_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, D] -> [B, F * (F - 1), D]."""
        return torch.cat((self.plain(embeddings), self.reweighted(self.senet(embeddings))), dim=1)


class SENET(nn.Module):
    """Weighs the features by what their embeddings' means say (squeeze, excitation, reweight; eqs. 2 to 4).

    Args:
        num_features (int): F.
        reduction (int): the inner layer is F / reduction wide, and at least 1.
    """

    def __init__(self, num_features: int, reduction: int) -> None:
        super().__init__()
        width = max(num_features // reduction, 1)
        self.reduce = nn.Linear(num_features, width, bias=False)
        self.excite = nn.Linear(width, num_features, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, D] -> [B, F, D]."""
        weights = torch.relu(self.excite(torch.relu(self.reduce(embeddings.mean(dim=2)))))
        return embeddings * weights.unsqueeze(2)


class BilinearInteraction(nn.Module):
    """(v_i W_ij) * v_j for every pair, with a matrix a pair ("field-interaction type", eq. 7).

    Args:
        num_features (int): F.
        embedding_dim (int): D.
    """

    first: Tensor
    second: Tensor

    def __init__(self, num_features: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_features = num_features
        first, second = pairs(num_features)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.weight = nn.Parameter(torch.empty(first.numel(), embedding_dim, embedding_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the matrices anew, and sets the pairs, in memory that may come from the meta device."""
        self.weight.normal_().div_(self.weight.shape[-1] ** 0.5)
        for pair, values in zip((self.first, self.second), pairs(self.num_features), strict=True):
            pair.copy_(values)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, F, D] -> [B, F * (F - 1) / 2, D]."""
        left = embeddings.index_select(1, self.first)
        return torch.einsum("bpd,pde->bpe", left, self.weight) * embeddings.index_select(1, self.second)
