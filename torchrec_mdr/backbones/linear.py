"""The first-order part of a backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema

LINEAR_DIM = 4


class LinearArch(nn.Module):
    """The first-order part: one weight an id, one a dense feature, summed. The bias is the over arch's.

    The tables are `LINEAR_DIM` wide, the narrowest that fbgemm's kernels take; only their first column is used. The
    others get a zero gradient and keep their zeros, so a weight moves as in a table of width 1: exactly under SGD,
    Adagrad, Adam and L2, where a sum or mean over the columns would rescale one or the other. Row-wise Adagrad alone
    steps twice as far, since its state is the mean square of the row.

    Args:
        embedding_bag_collection (EmbeddingBagCollection): from `build_tables(..., linear=True)`.
        num_dense_features (int): may be 0.
    """

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection, num_dense_features: int) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection)
        self.dense_arch = DenseWeights(num_dense_features)

    @staticmethod
    def from_schema(schema: Schema) -> LinearArch:
        """The first-order part for a data set, its tables on the meta device."""
        return LinearArch(build_tables(schema, LINEAR_DIM, linear=True), len(schema.dense_features))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Dense features [B, num_dense] and ids of B rows -> logits [B, 1]."""
        weights = self.sparse_arch(sparse_features)
        return weights[:, :, :1].sum(dim=1) + self.dense_arch(dense_features)


class DenseWeights(nn.Module):
    """One weight a dense feature; zero at the start, like the weights of the ids.

    Args:
        in_features (int): number of dense features, may be 0.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weights to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, dense_features: Tensor) -> Tensor:
        """[B, in_features] -> [B, 1]."""
        return nn.functional.linear(dense_features, self.weight)
