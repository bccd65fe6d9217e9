"""A model of somebody's own: a sequence tower on an EmbeddingCollection, pooled features, batch norm, dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

LENGTH = 3  # positions that are looked at
TARGETS = ["tower.*", "head.0", "head.4"]


class OwnModel(nn.Module):
    """Embeds a history, transforms each position, and pools.

    Args:
        recompute (bool | None): whether tower and head are checkpointed, reentrant (True) or not; None for neither.
        device (str): of the tables.
    """

    def __init__(self, recompute: bool | None = None, device: str = "cpu") -> None:
        super().__init__()
        where = torch.device(device)
        sequence = EmbeddingConfig(name="s_item", embedding_dim=8, num_embeddings=30, feature_names=["item"])
        pooled = EmbeddingBagConfig(name="p_user", embedding_dim=8, num_embeddings=30, feature_names=["user"])
        self.sequences = EmbeddingCollection(tables=[sequence], device=where)
        self.bags = EmbeddingBagCollection(tables=[pooled], device=where)
        self.tower = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
        self.head = nn.Sequential(
            nn.Linear(5 + 8 + 4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.Linear(4, 1)
        )
        self.recompute = recompute

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        history = self.sequences(sparse_features)["item"].to_padded_dense(LENGTH)
        user = self.bags(sparse_features)["user"]
        if self.recompute is None:
            return self.head(torch.cat([self._pooled(history), user, dense_features], 1))  # type: ignore[no-any-return]
        if self.recompute:  # which wants an input with a gradient
            history = history.detach().requires_grad_()
        own = checkpoint(self._pooled, history, use_reentrant=self.recompute)
        rows = torch.cat([own, user, dense_features], 1)
        return checkpoint(self.head, rows, use_reentrant=self.recompute)  # type: ignore[no-any-return]

    def _pooled(self, history: Tensor) -> Tensor:
        return F.relu(self.tower(history)).mean(1)
