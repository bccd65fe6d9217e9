"""What the tests of the backbones share: a schema and a batch of random rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.registry import BACKBONES

NUM_EMBEDDINGS = (5, 7, 3, 6)
# each with two dense features; without any, one backbone for each way of using them, and the others in the full product
CASES = [
    pytest.param(name, num_dense, marks=() if num_dense or name in ("mlp", "dlrm", "wdl") else pytest.mark.full)
    for name in BACKBONES
    for num_dense in (2, 0)
]


@pytest.fixture
def make_schema() -> Callable[..., Schema]:
    """Makes the schema of a data set with four sparse features, or as many as the vocabulary sizes given."""

    def make(num_dense: int = 2, num_embeddings: tuple[int, ...] = NUM_EMBEDDINGS) -> Schema:
        return Schema(
            dataset="random",
            label="label",
            sparse_features=tuple(SparseFeature(f"f{i}", size) for i, size in enumerate(num_embeddings)),
            dense_features=tuple(f"d{i}" for i in range(num_dense)),
            divisions=(Division("scenario", 1),),
            rows={},
        )

    return make


@pytest.fixture
def make_rows() -> Callable[[Schema, int], tuple[Tensor, Tensor, KeyedJaggedTensor]]:
    """Makes random rows: dense features [B, num_dense], ids [B, F], and the ids as a jagged tensor."""

    def make(schema: Schema, batch_size: int) -> tuple[Tensor, Tensor, KeyedJaggedTensor]:
        sizes = [feature.num_embeddings for feature in schema.sparse_features]
        ids = torch.stack([torch.randint(size, (batch_size,)) for size in sizes], dim=1)
        sparse_features = KeyedJaggedTensor.from_lengths_sync(
            keys=[feature.name for feature in schema.sparse_features],
            values=ids.t().flatten(),
            lengths=torch.ones(ids.numel(), dtype=torch.int32),
        )
        return torch.randn(batch_size, len(schema.dense_features)), ids, sparse_features

    return make
