"""The batch that goes through the train pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_mdr.ops.groups import BatchDomains


@dataclass
class DomainBatch(Pipelineable):
    """One rank's share of a global batch, its rows sorted by their combination of domains.

    Args:
        dense_features (Tensor): float32 [B, num_dense_features]; the width may be 0.
        sparse_features (KeyedJaggedTensor): keys in the schema's order, B rows.
        labels (Tensor): float32 [B].
        domains (BatchDomains): domain ids [B, V] and their groups, divisions in the run's order.
        global_rows (int): rows of this batch over all ranks, what a mean over rows divides by.
        row_positions (Tensor | None): int64 [B], each row's place among those this rank keeps in memory, the same in
            every epoch; None where rows are read as they are needed.
        weights (Tensor | None): float32 [B], how much each row counts in loss and metrics; None where each counts once.
    """

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor
    domains: BatchDomains
    global_rows: int
    row_positions: Tensor | None = None
    weights: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> DomainBatch:
        """Copies the batch to a device."""
        return DomainBatch(
            self.dense_features.to(device, non_blocking=non_blocking),
            self.sparse_features.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.domains.to(device, non_blocking),
            self.global_rows,
            None if self.row_positions is None else self.row_positions.to(device, non_blocking=non_blocking),
            None if self.weights is None else self.weights.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the caching allocator that the tensors are used on this stream."""
        self.dense_features.record_stream(stream)
        self.sparse_features.record_stream(stream)
        self.labels.record_stream(stream)
        self.domains.record_stream(stream)
        if self.row_positions is not None:
            self.row_positions.record_stream(stream)
        if self.weights is not None:
            self.weights.record_stream(stream)

    def pin_memory(self) -> DomainBatch:
        """Copies the batch to page-locked memory."""
        return DomainBatch(
            self.dense_features.pin_memory(),
            self.sparse_features.pin_memory(),
            self.labels.pin_memory(),
            self.domains.pin_memory(),
            self.global_rows,
            None if self.row_positions is None else self.row_positions.pin_memory(),
            None if self.weights is None else self.weights.pin_memory(),
        )
