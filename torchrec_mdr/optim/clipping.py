"""Clipping gradients such that no domain's step depends on another domain's gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.bank import Bank


class DomainClipping:
    """Scales down gradients whose norm is too large, each domain's by a norm of its own.

    A domain's norm is that of its rows in all banks of its division. What domains share, gates say, has one norm.

    Args:
        banks (Iterable[Bank]): banks whose gradients are clipped.
        shared (Iterable[nn.Parameter]): parameters that all domains share.
        sizes (Sequence[int]): number of domains of each division.
        max_norm (float): the largest norm that stays.

    Raises:
        ValueError: max_norm is not positive.

    Example::

        >>> from torchrec_mdr.adapters import LoRABank
        >>> bank = LoRABank(2, 3, 1, 1)
        >>> bank.bias.grad = torch.tensor([[3.0], [0.5]])
        >>> DomainClipping([bank], [], [2], max_norm=1.0).clip()
        >>> [round(value, 4) for value in bank.bias.grad.flatten().tolist()]
        [1.0, 0.5]
    """

    def __init__(
        self, banks: Iterable[Bank], shared: Iterable[nn.Parameter], sizes: Sequence[int], max_norm: float
    ) -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, not {max_norm}")
        self.banks = list(banks)
        self.shared = list(shared)
        self.sizes = list(sizes)
        self.max_norm = max_norm
        self._owners: dict[int, Tensor] = {}  # by id of the bank, on its device

    @torch.no_grad()
    def clip(self) -> None:
        """Scales the gradients at hand, in place; without a host sync."""
        for division, size in enumerate(self.sizes):
            rows = [
                (self._owners_of(bank, size, parameter.device), parameter.grad)
                for bank in self.banks
                if bank.division == division
                for parameter in bank.parameters(recurse=False)
                if parameter.grad is not None
            ]
            if not rows:
                continue
            squares = rows[0][1].new_zeros(size)
            for owners, grad in rows:
                squares.index_add_(0, owners, grad.square().flatten(1).sum(1))
            scale = self._scale(squares.sqrt())
            for owners, grad in rows:
                grad.mul_(scale[owners].view(-1, *[1] * (grad.dim() - 1)))
        grads = [parameter.grad for parameter in self.shared if parameter.grad is not None]
        if grads:
            scale = self._scale(torch.nn.utils.get_total_norm(grads))
            for grad in grads:
                grad.mul_(scale)

    def _owners_of(self, bank: Bank, num_domains: int, device: torch.device) -> Tensor:
        if id(bank) not in self._owners:
            self._owners[id(bank)] = bank.owners(num_domains).to(device)
        return self._owners[id(bank)]

    def _scale(self, norms: Tensor) -> Tensor:
        """What gradients of these norms are multiplied by; exactly 1 where nothing is too large."""
        return torch.where(norms > self.max_norm, self.max_norm / norms, 1.0)
