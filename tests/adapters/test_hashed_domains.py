"""Hashed ids: the published function, spread evenly, the same wherever and in whatever form they come."""

from __future__ import annotations

import torch

from torchrec_mdr.adapters import HashedDomains


def reference(number: int) -> int:
    """splitmix64's finalizer in Python's whole numbers; a signed number, as int64 has it."""
    number &= 2**64 - 1
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
    number ^= number >> 31
    return number - 2**64 if number >= 2**63 else number


def test_ids_are_mixed_as_published() -> None:
    ids = [0, 1, 2, 10**15, 2**63 - 1, -(2**63), -2, 123456789]
    for domains in (1, 7, 1000, 10**6 + 3):
        found = HashedDomains(domains)(torch.tensor(ids))
        assert found.tolist() == [reference(number) % domains for number in ids]
        assert found.min() >= 0 and found.max() < domains


def test_ids_in_a_row_spread_evenly_and_unknown_ones_stay_unknown() -> None:
    counts = torch.bincount(HashedDomains(100)(torch.arange(100_000)), minlength=100)
    chi_square = float(((counts - 1000.0) ** 2 / 1000).sum())
    assert 60 < chi_square < 150  # 99 degrees of freedom
    assert HashedDomains(5)(torch.tensor([[-1], [3]]))[:, 0].tolist() == [-1, reference(3) % 5]
