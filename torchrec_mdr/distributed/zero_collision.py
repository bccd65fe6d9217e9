"""Ids of domains that nobody has counted, each with a row of its own: TorchRec's zero-collision hashing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.hash_mc_evictions import (
    HashZchEvictionConfig,
    HashZchEvictionPolicyName,
    HashZchEvictionScorer,
)
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

FEATURE = "domain"
_CONFIG = HashZchEvictionConfig(features=[FEATURE], single_ttl=0)


class ZeroCollisionDomains(nn.Module):
    """Gives every id, known before or not, a domain of its own; where all are taken, the least recently seen one's.

    TorchRec's :class:`HashZchManagedCollisionModule` with its LRU eviction, whose clock counts steps here, not hours.
    Where the model trains, ids that come for the first time get a domain; everywhere else, and where TorchRec finds no
    domain that may be had, they have none (-1), so that no id meets another one's adapters. All ranks come to the same:
    the first one has the hashing done for the distinct ids of all, and tells the others.

    Its state belongs into the loop's checkpoints. The adapters of evicted ids go on with whoever gets their domain
    unless :meth:`on_evicted` resets them, see :func:`reset_domains`.

    Args:
        num_domains (int): N.
        device (torch.device | str | None): of the tables of ids, 12 bytes a domain on every rank; a GPU, or any device
            with read_only. The current GPU where left out.
        max_probe (int): places, from an id's hash on, that it may have; among them the least recently seen is evicted.
        read_only (bool): whether ids are looked up alone, as another process has learnt them.

    Raises:
        ValueError: N is below 1, or a device on which TorchRec cannot train.

    Example::

        >>> ZeroCollisionDomains(1_000_000, device="cpu")
        Traceback (most recent call last):
        ...
        ValueError: zero-collision hashing trains on CUDA alone, ...
        >>> known = ZeroCollisionDomains(1_000_000, device="cpu", read_only=True)
        >>> known(torch.tensor([10**15, -1])).tolist()  # it has learnt none
        [-1, -1]
    """

    steps: Tensor

    def __init__(
        self,
        num_domains: int,
        device: torch.device | str | None = None,
        max_probe: int = 128,
        read_only: bool = False,
    ) -> None:
        super().__init__()
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if num_domains < 1:
            raise ValueError(f"ZeroCollisionDomains needs at least one domain, not {num_domains}")
        if where.type != "cuda" and not read_only:
            raise ValueError(
                f"zero-collision hashing trains on CUDA alone, since TorchRec has no kernel for {where.type}; take "
                "HashedDomains, or read_only=True for ids that a GPU has learnt"
            )
        self.num_domains, self.read_only = num_domains, read_only
        self.table = HashZchManagedCollisionModule(
            num_domains,
            where,
            total_num_buckets=1,
            max_probe=min(max_probe, num_domains),
            eviction_policy_name=HashZchEvictionPolicyName.LRU_EVICTION,
            eviction_config=_CONFIG,
        )
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64, device=where))
        self._evicted: list[Callable[[Tensor], None]] = []
        self._learns = True  # how the table is set

    def on_evicted(self, call: Callable[[Tensor], None]) -> None:
        """Has something done about domains int64 [E], ascending, before other ids get them; on all ranks alike."""
        self._evicted.append(call)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 of any shape, -1 for none -> domains int64 in [0, N), -1 where there is none.

        In training mode, where gradients are taken, ids get domains, and all ranks come here together.
        """
        distinct, places = torch.unique(ids, return_inverse=True)
        here = distinct.to(self.table.device)
        learns = self.training and not self.read_only and torch.is_grad_enabled()
        with torch.no_grad():
            domains = self._learn(here) if learns else self._hashed(here, learns)
        return domains.to(ids.device)[places]

    def _learn(self, own: Tensor) -> Tensor:
        """Domains of this rank's distinct ids, after those of all ranks have got theirs."""
        self.steps += 1
        ids = _of_all_ranks(own)
        ids = ids[ids != -1]
        found = ids.new_empty(2, len(ids))
        together = dist.is_initialized() and dist.get_world_size() > 1
        if not together or dist.get_rank() == 0:
            domains = self._hashed(ids, True)
            gone = self.table.evict()
            evicts = torch.zeros_like(ids) if gone is None else torch.isin(domains, gone).long()
            found = torch.stack([domains, evicts])
        if together:
            dist.broadcast(found, src=0)
        domains, evicts = found
        known = domains >= 0
        identities, seen = self.table._hash_zch_identities, self.table._hash_zch_metadata
        identities[domains[known], 0] = ids[known]
        seen[domains[known], 0] = self.steps.to(seen.dtype)
        evicted = domains[known & (evicts > 0)].sort().values
        if len(evicted):
            for call in self._evicted:
                call(evicted)
        result = torch.full_like(own, -1)
        result[own != -1] = domains[torch.searchsorted(ids, own[own != -1])]
        return result

    def _hashed(self, ids: Tensor, learns: bool) -> Tensor:
        """The domains that TorchRec gives distinct ids [U], those it has; -1 for others."""
        if not len(ids):
            return ids
        if learns != self._learns or self.table.training != learns:
            self.table.reset_training_mode() if learns else self.table.reset_intrainer_bulk_eval_mode()
            self._learns = learns
        if learns:
            self.table._eviction_module._eviction_module._eviction_scorer = _LastSeen(self.steps)
        feature = JaggedTensor(ids, lengths=torch.ones_like(ids))
        slots: Tensor = self.table({FEATURE: feature})[FEATURE].values()
        has = (self.table._hash_zch_identities[slots, 0] == ids) & (ids != -1)  # and no other id's that it fell on
        return torch.where(has, slots, -1)


class _LastSeen(HashZchEvictionScorer):
    """Ids were last seen in this step; whoever was not may be evicted, the one whose step is the lowest."""

    def __init__(self, steps: Tensor) -> None:
        super().__init__(_CONFIG)
        self.steps = steps

    def gen_score(self, feature: JaggedTensor, device: torch.device) -> Tensor:
        return self.steps.to(device, torch.int32).expand(len(feature.values())).contiguous()

    def gen_threshold(self) -> int:
        return 2**31 - 1


def _of_all_ranks(own: Tensor) -> Tensor:
    """The distinct ids of all ranks, ascending."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    counts = [int(size) for size in sizes]
    parts = [own.new_empty(max(counts)) for _ in counts]
    dist.all_gather(parts, torch.cat([own, own.new_zeros(max(counts) - len(own))]))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).unique()
