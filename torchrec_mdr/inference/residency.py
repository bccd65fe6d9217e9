"""Which adapters of a division lie in memory, and where; what a call reads stays as it is until it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, RLock

import torch
from torch import Tensor

Load = Callable[[int, int], Mapping[str, Tensor]]  # (domain, version) -> its rows by table


class TooManyDomains(ValueError):
    """A call names more domains than may be in memory at a time."""


@dataclass
class Snapshot:
    """What serves at one moment. It never changes, and its places hold the same rows while somebody reads it.

    Args:
        number (int): grows with every snapshot.
        versions (Tensor): int64 [D + 1], each domain's version, 0 where it has no adapter; the last of unknown domains.
        places (Tensor): int64 [D + 1], where its adapter lies: 0 where it has none, -1 where it is on disk.
        readers (int): calls that read it.
    """

    number: int
    versions: Tensor
    places: Tensor
    readers: int = 0


class Residency:
    """The tables of one division, and the adapters in them.

    A new version goes to a free place, and a new snapshot leads to it. The old one's place is zeroed and free again
    when the last call that may read it is done.

    Args:
        tables (Mapping[str, Tensor]): [1 + P, ...], which the model reads; place 0 is that of unknown domains.
        load (Load): reads a version's rows from disk.
        resident (int): most adapters that lie in memory and serve; the other places are for versions that change.
        loads (int): how many adapters are read at a time.
    """

    def __init__(self, tables: Mapping[str, Tensor], load: Load, resident: int, loads: int = 1) -> None:
        self.tables = dict(tables)
        self._load, self._loads = load, loads
        self.num_places = len(next(iter(self.tables.values()))) - 1
        self.resident = resident
        self._writing = RLock()  # one change at a time
        self._state = Condition()  # what follows is read and written under it
        self._free = list(range(self.num_places, 0, -1))
        self._used = torch.zeros(self.num_places + 1, dtype=torch.int64)  # when each place was last read
        self._calls = 0
        self._retired: list[tuple[int, list[int]]] = []  # places, and the first snapshot that cannot read them
        self._read: list[Snapshot] = []
        self._pinned: set[int] = set()
        self._now = Snapshot(0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    @property
    def num_resident(self) -> int:
        """How many adapters lie in memory and serve."""
        return int((self._now.places > 0).sum())

    def has(self, domains: Tensor) -> Tensor:
        """Which domains int64 [B], -1 for unknown ones, have an adapter, in memory or on disk; bool [B]."""
        return self._now.places[domains] != 0

    @contextmanager
    def reading(self, domains: Tensor) -> Iterator[Snapshot]:
        """A snapshot in which the adapters of these domains are in memory.

        Args:
            domains (Tensor): int64 [B], -1 for unknown ones.

        Raises:
            TooManyDomains: they have more adapters than may be in memory.
        """
        snapshot = self._enter(domains)
        if snapshot is None:
            with self._writing:
                self._bring(domains)
                snapshot = self._enter(domains)
            assert snapshot is not None, "nobody else changes what is in memory"
        try:
            yield snapshot
        finally:
            with self._state:
                snapshot.readers -= 1
                if snapshot.readers == 0:
                    self._read.remove(snapshot)
                    self._release()

    def update(self, versions: Sequence[int], pinned: set[int]) -> None:
        """Takes up what `current.json` says.

        Args:
            versions (Sequence[int]): of each domain, 0 for none; there may be more domains than before, never fewer.
            pinned (set[int]): domains that stay in memory.
        """
        with self._writing:
            old = self._now
            new = torch.tensor([*versions, 0])
            room = new.new_zeros(len(new) - len(old.versions))
            before, places = (torch.cat([t[:-1], room, t[-1:]]) for t in (old.versions, old.places))
            changed = before != new
            swapped = (changed & (places > 0) & (new > 0)).nonzero().flatten().tolist()
            removed = places[changed & (places > 0) & (new == 0)].tolist()
            self._pinned = pinned
            places[changed & (new == 0)] = 0
            places[changed & (new > 0) & (places == 0)] = -1
            first = new.clone()
            first[swapped] = before[swapped]
            self._publish(first, places, removed)
            for domain in swapped:
                self._put(domain, int(new[domain]))
            if pinned:
                self._bring(torch.tensor(sorted(pinned)))

    def fill(self) -> None:
        """Brings adapters into memory until no more fit."""
        with self._writing:
            on_disk = (self._now.places < 0).nonzero().flatten()
            self._bring(on_disk[: max(self.resident - self.num_resident, 0)])

    def _enter(self, domains: Tensor) -> Snapshot | None:
        """The snapshot of now, read from here on; None where an adapter is not in memory."""
        with self._state:
            snapshot = self._now
            places = snapshot.places[domains]
            if bool((places < 0).any()):
                return None
            if not snapshot.readers:
                self._read.append(snapshot)
            snapshot.readers += 1
            self._calls += 1
            self._used[places] = self._calls
            return snapshot

    def _bring(self, domains: Tensor) -> None:
        """Loads adapters that lie on disk, in place of those that were not read for longest."""
        wanted = domains.unique()
        wanted = wanted[(wanted >= 0) & (self._now.places[wanted] != 0)]
        keep = self._pinned | set(wanted.tolist())
        if len(keep) > self.resident:
            raise TooManyDomains(
                f"{len(keep)} adapters are wanted at a time, and {self.resident} may be in memory; "
                "export the bundle with a larger --resident, or pin fewer"
            )
        missing = wanted[self._now.places[wanted] < 0].tolist()
        over = self.num_resident + len(missing) - self.resident
        if over > 0:
            places = self._now.places.clone()
            held = [domain for domain in (places > 0).nonzero().flatten().tolist() if domain not in keep]
            longest = sorted(held, key=lambda domain: int(self._used[places[domain]]))[:over]
            evicted = places[longest].tolist()
            places[longest] = -1
            self._publish(self._now.versions, places, evicted)
        if missing:
            filled = [self._fill(rows) for rows in self._read_rows(missing, self._now.versions[missing].tolist())]
            places = self._now.places.clone()
            places[missing] = torch.tensor(filled)
            self._publish(self._now.versions, places, [])

    def _put(self, domain: int, version: int) -> None:
        """Puts a version in the place of another."""
        place = self._fill(self._load(domain, version))
        now = self._now
        versions, places = now.versions.clone(), now.places.clone()
        before = int(places[domain])
        versions[domain], places[domain] = version, place
        self._publish(versions, places, [before])

    def _read_rows(self, domains: Sequence[int], versions: Sequence[int]) -> Iterable[Mapping[str, Tensor]]:
        if self._loads == 1 or len(domains) == 1:
            return map(self._load, domains, versions)
        with ThreadPoolExecutor(self._loads) as pool:
            return list(pool.map(self._load, domains, versions))

    def _fill(self, rows: Mapping[str, Tensor]) -> int:
        """Puts a version into a free place, which nobody reads yet; waits for one where calls hold them all."""
        with self._state:
            while not self._free:
                self._state.wait()
            place = self._free.pop()
        for name, table in self.tables.items():
            table[place].copy_(rows[name])
        return place

    def _publish(self, versions: Tensor, places: Tensor, retired: list[int]) -> None:
        with self._state:
            self._now = Snapshot(self._now.number + 1, versions, places)
            if retired:
                self._retired.append((self._now.number, retired))
                self._release()

    def _release(self) -> None:
        """Zeroes and frees the places that no call can read any more."""
        oldest = min((snapshot.number for snapshot in self._read), default=self._now.number)
        while self._retired and self._retired[0][0] <= oldest:
            _, places = self._retired.pop(0)
            for table in self.tables.values():
                for place in places:
                    table[place].zero_()
            self._free += places
            self._state.notify_all()
