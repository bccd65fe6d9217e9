"""A lookup of embeddings that can be watched, measured, and stood in for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_mdr.experiments.leave_one_out.curvature import Curvature

CURVATURE_BYTES = 1 << 30  # memory of a rank for blocks of curvature; above it, their diagonals


class Lookup:
    """One sparse arch, whose output can be watched, or given in place of a lookup.

    Args:
        arch (nn.Module): not sharded yet, returns embeddings [B, F, D] for a KeyedJaggedTensor; gets a new forward.
    """

    def __init__(self, arch: nn.Module) -> None:
        collection = next(m for m in arch.children() if isinstance(m, EmbeddingBagCollection))
        self.tables = {name: table for table in collection.embedding_bag_configs() for name in table.feature_names}
        self.dim = max(table.embedding_dim for table in self.tables.values())
        self.curvatures: dict[str, Curvature] = {}
        self.kept: Tensor | None = None
        self.watching = False
        self.given: Tensor | None = None
        self.leaf: Tensor | None = None
        self._lookup = arch.forward
        arch.forward = self._forward

    def _forward(self, *args: object, **kwargs: object) -> Tensor:
        if self.given is not None:
            return self.given
        output: Tensor = self._lookup(*args, **kwargs)
        if not self.watching or not isinstance(output, Tensor):  # a proxy, while the pipeline traces
            return output
        self.leaf = output.detach().requires_grad_()
        return self.leaf

    def start_measuring(self, device: torch.device) -> None:
        """Forgets all curvature."""
        ids = sum(table.num_embeddings for table in self.tables.values())
        diagonal = 4 * ids * self.dim * self.dim > CURVATURE_BYTES
        self.curvatures = {
            name: Curvature(table.num_embeddings, self.dim, device, diagonal) for name, table in self.tables.items()
        }

    def measure(self, features: KeyedJaggedTensor, roots: Tensor, l2: float) -> None:
        """Adds a batch's curvature; roots of the pooled embeddings, [B, F, D]."""
        for f, (name, curvature) in enumerate(self.curvatures.items()):
            ids, rows, shares = self._pairs(name, features[name])
            curvature.add(ids, roots[:, f].index_select(0, rows) * shares[:, None], 2.0 * l2 * shares * shares)

    def moves(self, features: KeyedJaggedTensor, roots: Tensor, gradients: Tensor) -> Tensor:
        """What leaving a row out moves its pooled embeddings by, [B, F, D], from roots and gradients of that shape."""
        moves = torch.zeros_like(gradients)
        for f, (name, curvature) in enumerate(self.curvatures.items()):
            ids, rows, shares = self._pairs(name, features[name])
            share = shares[:, None]
            own = [values[:, f].index_select(0, rows) * share for values in (roots, gradients)]
            moves[:, f].index_add_(0, rows, curvature.leave_out(ids, *own) * share)
        return moves

    def _pairs(self, name: str, bags: JaggedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each id of a feature's bags, the row it is in, and its share in the row's pooled embedding."""
        ids, lengths = bags.values().long(), bags.lengths()
        rows = torch.repeat_interleave(
            torch.arange(lengths.numel(), device=ids.device), lengths, output_size=ids.numel()
        )
        shares = torch.ones(ids.numel(), device=ids.device)
        if self.tables[name].pooling is PoolingType.MEAN:
            shares = 1.0 / lengths.index_select(0, rows).float()
        return ids, rows, shares
