"""Ids of domains that nobody has counted, as rows of tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# the finalizer of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers: products wrap
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class HashedDomains(nn.Module):
    """Gives every id, known before or not, one of a fixed number of domains; no tensor is held, and nothing is counted.

    With banks of so many domains, an id that has never come before has adapters at once, and nobody has to number ids.
    Ids that fall on one domain share its adapters: of K ids on N domains, about 1 - exp(-K / N) of them are not alone.
    Where each shall be alone, number them, and add new ones as new domains.

    Args:
        num_domains (int): N.

    Raises:
        ValueError: N is below 1.

    Example::

        >>> hashed = HashedDomains(1000)
        >>> ids = torch.tensor([10**15, 7, -1, 10**15])
        >>> domains = hashed(ids)
        >>> bool(domains[0] == domains[3]), int(domains[2]), bool((domains < 1000).all())
        (True, -1, True)
    """

    def __init__(self, num_domains: int) -> None:
        super().__init__()
        if num_domains < 1:
            raise ValueError(f"HashedDomains needs at least one domain, not {num_domains}")
        self.num_domains = num_domains

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 of any shape, -1 for none -> domains int64 in [0, N), -1 where there is none."""
        mixed = (ids ^ _shifted(ids, 30)) * _FIRST
        mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
        mixed = mixed ^ _shifted(mixed, 31)
        return torch.where(ids == -1, -1, mixed.remainder(self.num_domains))


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, with zeros on the left, as of unsigned numbers."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
