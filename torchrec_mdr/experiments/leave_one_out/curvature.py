"""How strongly the training loss holds each id's embedding in place."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_mdr.ops.collectives import sum_over_ranks

RIDGE = 1e-4  # of the mean curvature, added to every id's: a few rows may leave directions free
MOST_LEVERAGE = 0.9  # of a row on its own embedding: a row that is the only one of its id holds it all


class Curvature:
    """Second derivatives of the loss of all rows by the embeddings of one feature: Gauss-Newton, a block per id.

    The loss of row i bends by ``r_i r_i^T``, ``r_i = sqrt(p_i (1 - p_i)) d logit_i / d e``, and by its share of the
    penalty. Rows are added first, then :meth:`finish`, then :meth:`leave_out`.

    Args:
        num_embeddings (int): N.
        dim (int): D.
        device (torch.device): where it is kept.
        diagonal (bool): keep [N, D] in place of [N, D, D]: less memory, a rougher answer.

    Example::

        >>> curvature = Curvature(2, 1, torch.device("cpu"))
        >>> curvature.add(torch.tensor([0, 0, 0]), torch.tensor([[1.0], [1.0], [2.0]]), torch.zeros(3))
        >>> curvature.finish()
        >>> move = curvature.leave_out(torch.tensor([0]), torch.tensor([[1.0]]), torch.tensor([[10.0]]))
        >>> round(float(move), 2)  # 10 / (6 - 1)
        2.0
    """

    def __init__(self, num_embeddings: int, dim: int, device: torch.device, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        shape = (num_embeddings, dim) if diagonal else (num_embeddings, dim, dim)
        self.total = torch.zeros(shape, device=device)

    def add(self, ids: Tensor, roots: Tensor, penalties: Tensor) -> None:
        """Adds rows.

        Args:
            ids (Tensor): int64 [L].
            roots (Tensor): [L, D], r_i.
            penalties (Tensor): [L], second derivative of the row's share of the penalty.
        """
        if self.diagonal:
            self.total.index_add_(0, ids, roots * roots + penalties[:, None])
        else:
            blocks = roots[:, :, None] * roots[:, None, :]
            blocks.diagonal(dim1=1, dim2=2).add_(penalties[:, None])
            self.total.index_add_(0, ids, blocks)

    def finish(self) -> None:
        """Adds up the ranks, and prepares for :meth:`leave_out`."""
        self.total = sum_over_ranks(self.total)
        if self.diagonal:
            self.total.add_(RIDGE * self.total.mean().clamp(min=1e-12))
            return
        diagonal = self.total.diagonal(dim1=1, dim2=2)
        diagonal.add_(RIDGE * diagonal.mean().clamp(min=1e-12))
        self.total = torch.linalg.inv(self.total)

    def leave_out(self, ids: Tensor, roots: Tensor, gradients: Tensor) -> Tensor:
        """What embeddings move by when one row is left out: the Newton step of what remains, by Sherman and Morrison.

        Args:
            ids (Tensor): int64 [L].
            roots (Tensor): [L, D], of the row that is left out.
            gradients (Tensor): [L, D], of its loss.

        Returns:
            Tensor: [L, D].
        """
        if self.diagonal:
            return gradients / (self.total[ids] - MOST_LEVERAGE * roots * roots)
        inverse = self.total[ids]
        step = torch.einsum("lij,lj->li", inverse, gradients)
        own = torch.einsum("lij,lj->li", inverse, roots)
        leverage = (roots * own).sum(1, keepdim=True).clamp(max=MOST_LEVERAGE)
        return step + own * ((roots * step).sum(1, keepdim=True) / (1.0 - leverage))
