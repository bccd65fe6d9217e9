"""Batches, tables and training loops in plain PyTorch: what the sharded pipeline is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Schema


@dataclass(frozen=True)
class PlainBatch:
    """A batch as plain tensors.

    Args:
        ids (Tensor): int64 [B, F].
        dense (Tensor): [B, num_dense].
        labels (Tensor): [B].
        domains (Tensor): int64 [B].
        domain (int | None): the rows' one domain, where they have one.
    """

    ids: Tensor
    dense: Tensor
    labels: Tensor
    domains: Tensor
    domain: int | None = None

    @staticmethod
    def of(batch: DomainBatch) -> PlainBatch:
        """The same rows, by the domains of their first division; one id a row and feature."""
        ids = batch.sparse_features.values().view(len(batch.sparse_features.keys()), -1).T.contiguous()
        return PlainBatch(ids, batch.dense_features, batch.labels, batch.domains.ids[:, 0].contiguous())

    def take(self, index: Tensor, domain: int | None = None) -> PlainBatch:
        """Some of the rows."""
        return self._map(lambda column: column.index_select(0, index), domain)

    def to(self, device: torch.device) -> PlainBatch:
        """Copies the batch to a device."""
        return self._map(lambda column: column.to(device), self.domain)

    def _map(self, change: Callable[[Tensor], Tensor], domain: int | None) -> PlainBatch:
        return PlainBatch(change(self.ids), change(self.dense), change(self.labels), change(self.domains), domain)


def single_domain_batches(batches: Sequence[PlainBatch], batch_size: int) -> list[PlainBatch]:
    """The same rows in batches of one domain each, at most so large."""
    rows = PlainBatch(
        torch.cat([batch.ids for batch in batches]),
        torch.cat([batch.dense for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.domains for batch in batches]),
    )
    return [
        rows.take(part, domain)
        for domain in rows.domains.unique().tolist()
        for part in (rows.domains == domain).nonzero().flatten().split(batch_size)
    ]


class Embeddings(nn.Module):
    """A table a sparse feature, the dense features beside.

    Args:
        schema (Schema): features.
        dim (int): width of the tables.
    """

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(feature.num_embeddings, dim) for feature in schema.sparse_features)
        self.width = dim * len(self.tables) + len(schema.dense_features)

    def forward(self, batch: PlainBatch) -> Tensor:
        """[B, width]."""
        embeddings = [table(ids) for table, ids in zip(self.tables, batch.ids.unbind(1), strict=True)]
        return torch.cat([*embeddings, batch.dense], 1)


class PlainMLP(nn.Module):
    """The `mlp` backbone as one would write it in PyTorch alone.

    Args:
        schema (Schema): features.
        dim (int): width of the tables.
        hidden (Sequence[int]): widths of the hidden layers.
    """

    def __init__(self, schema: Schema, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.embeddings = Embeddings(schema, dim)
        pairs = pairwise([self.embeddings.width, *hidden])
        layers = [module for into, out in pairs for module in (nn.Linear(into, out), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, batch: PlainBatch) -> Tensor:
        """Logits [B]."""
        logits: Tensor = self.mlp(self.embeddings(batch)).squeeze(1)
        return logits


def plain_step(model: nn.Module, gives_logits: bool = True) -> Callable[[PlainBatch], None]:
    """What trains all of a model that requires a gradient on one batch, with Adam.

    Args:
        model (nn.Module): batch in, [B] out; already on its device.
        gives_logits (bool): or probabilities.
    """
    loss_of = F.binary_cross_entropy_with_logits if gives_logits else F.binary_cross_entropy
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()

    def step(batch: PlainBatch) -> None:
        loss = loss_of(model(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
