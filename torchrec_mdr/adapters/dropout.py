"""Dropout whose mask is cheap to draw on CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 1 << 16


class FastDropout(nn.Dropout):
    """``nn.Dropout``; on CPU each element is decided by 16 bits of a 64-bit draw.

    PyTorch's CPU kernel draws a double for every element one after the other, which made it the dearest operation of
    an MLP's training step (`python -m benchmarks.dropout` compares). The share dropped is p rounded to a
    multiple of 1/65,536, and what is kept is scaled by the rounded share, so that means are exact.

    Args:
        p (float): share of the elements that is dropped.

    Example::

        >>> dropped = FastDropout(0.25)(torch.ones(100_000))
        >>> sorted({round(float(x), 4) for x in dropped.unique()})
        [0.0, 1.3333]
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self._dropped = min(round(p * _LEVELS), _LEVELS)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or input.device.type != "cpu" or self._dropped in (0, _LEVELS):
            return super().forward(input)
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = draws.view(torch.int16)[: input.numel()].view(input.shape)
        kept = (levels >= self._dropped - _LEVELS // 2).to(input.dtype)
        return input * kept.mul_(_LEVELS / (_LEVELS - self._dropped))
