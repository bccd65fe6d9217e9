"""Opens a bundle and scores rows, in any number of threads, while adapters come and go."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.served import combination_rows
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.inference.adapter_file import AdapterFile, read_adapter, read_rows, tables_of
from torchrec_mdr.inference.bundle import GOLDEN_BOUND, PACKAGE_FILE, GoldenRows, Manifest
from torchrec_mdr.inference.freeze import CALIBRATION, FlatModel, known_ids
from torchrec_mdr.inference.package import Package, flat_inputs
from torchrec_mdr.inference.parts import halves, pick
from torchrec_mdr.inference.rebuild import empty_tables, rebuild
from torchrec_mdr.inference.residency import Residency, Snapshot, TooManyDomains
from torchrec_mdr.inference.store import AdapterStore, Current, as_list
from torchrec_mdr.storage import is_store

WATCH_SECONDS = 1.0  # between two looks at a bundle in a store
LOADS = 16  # adapters that are read at a time from there

logger = logging.getLogger(__name__)
Domains = Tensor | Sequence[str | None] | Sequence[Sequence[str | None]]


class Scores(NamedTuple):
    """What a scorer answers.

    Args:
        logits (Tensor): float32 [B], the model's; of a row without a known domain, the backbone's.
        calibrated (Tensor): float64 [B], the logits by the calibration that the adapter of the natural domain holds.
        versions (Tensor): int64 [B, V], the version of the adapter that scored each row, 0 where its domain is unknown.
    """

    logits: Tensor
    calibrated: Tensor
    versions: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Float64 [B], of a positive label, calibrated."""
        return torch.sigmoid(self.calibrated)

    @property
    def known(self) -> Tensor:
        """Bool [B, V]: which divisions knew the row's domain."""
        return self.versions > 0


class Scorer:
    """A bundle, open. Any number of threads may call any method.

    What other processes put, roll back, remove or pin is seen by the next call; where the bundle lies in a store, by
    one that begins a second later, since no more than one call a second asks the store. Where that fails, it is logged,
    and what served last goes on serving.

    Args:
        bundle (str): the bundle's folder, on a disk or in an object store.
        compiled (bool | None): whether to run `model.pt2`, or the eager model, which needs no compiler and is slower;
            by default as the bundle was exported.
        threads (int): how many calls of the compiled model may run at a time.

    Raises:
        ValueError: the folder holds no bundle, one compiled for another machine, or one that lost weights.
    """

    def __init__(self, bundle: str, compiled: bool | None = None, threads: int = 4) -> None:
        self.store = AdapterStore(bundle)
        bundle = self.store.bundle
        self.manifest = manifest = Manifest.load(bundle)
        self.schema = Schema.load(bundle)
        self.run_model: Callable[..., Tensor]
        if manifest.compiled if compiled is None else compiled:
            package = Package(os.path.join(bundle, PACKAGE_FILE), threads)
            tables = empty_tables(bundle, manifest)
            package.share_tables({name: table for name, table in tables.items() if name != CALIBRATION})
            self.run_model = package
        else:
            model = rebuild(bundle, manifest)
            tables = {
                name: table for v in range(len(manifest.divisions)) for name, table in tables_of(model, v).items()
            }
            self.run_model = FlatModel(model)
        self._numbers = [{name: number for number, name in enumerate(own.domain_names)} for own in manifest.divisions]
        self._names = [list(own.domain_names) for own in manifest.divisions]
        self._residents: list[Residency] = []
        for v in range(len(manifest.divisions)):
            own = {name: table for name, table in tables.items() if manifest.tables[name][0] == v}
            loads = LOADS if is_store(self.folder) else 1
            self._residents.append(Residency(own, self._loader(v), manifest.resident[v], loads))
        self._calibration = tables[CALIBRATION]
        self._refreshing = Lock()
        self._watching = Lock()
        self._next_look = 0.0
        self._stamp: str | None = None
        self.refresh()
        for resident in self._residents:
            resident.fill()
        self.check_golden_rows()

    def score(self, dense: Tensor, features: KeyedJaggedTensor, domains: Domains) -> Scores:
        """Scores rows.

        Args:
            dense (Tensor): float32 [B, num_dense_features].
            features (KeyedJaggedTensor): B rows, keys in the manifest's order. Ids that a table lacks are unknown ones.
            domains (Tensor | Sequence): int64 [B, V] or, with one division, [B]; or names, one a row, or one of each
                division a row. Ids and names that no division has, and None, are unknown domains.

        Raises:
            ValueError: features in another order, a row of an unknown domain where the method has no backbone of its
                own, or one call with more domains than a bundle may hold in memory.
        """
        if tuple(features.keys()) != self.manifest.features:
            order = ", ".join(self.manifest.features)
            raise ValueError(f"features are {', '.join(features.keys())}; the bundle's are {order}, in this order")
        self._watch()
        ids = self._ids(domains)
        if len(ids) != len(dense):
            raise ValueError(f"there are {len(dense)} rows and {len(ids)} domains; give each row its own")
        if not len(ids):
            nothing = torch.zeros(0)
            return Scores(nothing, nothing.double(), ids)
        with torch.no_grad():
            return self._score_flat(*flat_inputs(dense, features, ids))

    def put(self, adapter: str | AdapterFile) -> int:
        """Has an adapter serve its domain, known or new, from the next row on.

        Args:
            adapter (str | AdapterFile): a file's path, or its content.

        Returns:
            int: its version.

        Raises:
            ValueError: it does not belong into this bundle, or is damaged.
        """
        path = adapter if isinstance(adapter, str) else f"the adapter of '{adapter.info.domain}'"
        read = read_adapter(adapter) if isinstance(adapter, str) else adapter
        self.manifest.check_adapter(read, path)
        version = self.store.put(read)
        self.refresh()
        return version

    def rollback(self, domain: str, division: str | None = None) -> int:
        """Has the version of a domain serve that served before; returns it. See :meth:`AdapterStore.rollback`."""
        version = self.store.rollback(self._division(division), domain)
        self.refresh()
        return version

    def remove(self, domain: str, division: str | None = None) -> None:
        """Makes a domain unknown. See :meth:`AdapterStore.remove`."""
        self.store.remove(self._division(division), domain)
        self.refresh()

    def pin(self, domain: str, division: str | None = None, pinned: bool = True) -> None:
        """Keeps a domain's adapter in memory, or not any more. See :meth:`AdapterStore.pin`."""
        self.store.pin(self._division(division), domain, pinned)
        self.refresh()

    def list(self) -> list[dict[str, Any]]:
        """One entry a domain that has an adapter: division, domain, version, pinned, and versions before."""
        return as_list(self.store.current())

    def resident(self, division: str | None = None) -> int:
        """How many adapters of a division lie in memory."""
        return self._residents[self.manifest.division_of(division)].num_resident

    def refresh(self) -> None:
        """Takes up what has changed in the bundle, if anything has. Calls do it first, see above."""
        if self.store.stamp() == self._stamp:
            return
        with self._refreshing:
            stamp = self.store.stamp()  # before the file is read: a change in between is seen next time
            if stamp != self._stamp:
                self._take_up(self.store.current())
                self._stamp = stamp

    def check_golden_rows(self) -> None:
        """Raises ValueError where the golden rows' logits are not those of the export.

        Rows of adapters that have changed since are left out.
        """
        golden = GoldenRows.load(self.store.bundle)
        scores = self._score_flat(golden.dense, golden.ids, golden.lengths, golden.domains)
        same = (scores.versions == torch.where(golden.domains >= 0, 1, 0)).all(1)
        golden.check(scores.logits, same, GOLDEN_BOUND, f"{self.store.bundle}: the model")

    def _watch(self) -> None:
        """Refreshes; of a store one call does it now and then, and others go on."""
        if not is_store(self.folder):
            self.refresh()
        elif time.monotonic() >= self._next_look and self._watching.acquire(blocking=False):
            try:
                if time.monotonic() >= self._next_look:  # else another call has looked in between
                    self._look()
            finally:
                self._watching.release()

    def _look(self) -> None:
        try:
            self.refresh()
        except ValueError as error:
            logger.warning("%s; scores go on by what served last", error)
        finally:
            self._next_look = time.monotonic() + WATCH_SECONDS

    def _division(self, name: str | None) -> str:
        return self.manifest.divisions[self.manifest.division_of(name)].name

    def _loader(self, v: int) -> Callable[[int, int], Mapping[str, Tensor]]:
        division = self.manifest.divisions[v].name

        def load(domain: int, version: int) -> Mapping[str, Tensor]:
            return read_rows(self.store.path(division, self._names[v][domain], version))

        return load

    def _take_up(self, current: Current) -> None:
        for v, division in enumerate(self.manifest.divisions):
            serving = current.serving.get(division.name, {})
            numbers, names = self._numbers[v], self._names[v]
            for name in serving:
                if name not in numbers:
                    names.append(name)
                    numbers[name] = len(names) - 1
            versions = [own.version if (own := serving.get(name)) else 0 for name in names]
            pinned = {numbers[name] for name, own in serving.items() if own.pinned}
            self._residents[v].update(versions, pinned)

    def _ids(self, domains: Domains) -> Tensor:
        """Domains as numbers int64 [B, V], -1 where unknown."""
        if isinstance(domains, Tensor):
            return known_ids(domains, self.manifest.sizes)
        rows = [[own] if own is None or isinstance(own, str) else list(own) for own in domains]
        count = len(self._numbers)
        if any(len(row) != count for row in rows):
            names = ", ".join(division.name for division in self.manifest.divisions)
            raise ValueError(f"a row has {count} domains, one of each division ({names}); None where one is unknown")
        numbers = [
            [-1 if name is None else own.get(name, -1) for own, name in zip(self._numbers, row, strict=True)]
            for row in rows
        ]
        return torch.tensor(numbers, dtype=torch.int64).view(len(rows), count)

    def _score_flat(self, dense: Tensor, values: Tensor, lengths: Tensor, ids: Tensor) -> Scores:
        try:
            with ExitStack() as stack:
                snapshots = [
                    stack.enter_context(own.reading(column))
                    for own, column in zip(self._residents, ids.unbind(1), strict=True)
                ]
                return self._answer(dense, values, lengths, ids, snapshots)
        except TooManyDomains:
            both = halves(ids)
            if both is None:
                raise
        parts = [self._score_flat(*pick(dense, values, lengths, ids, rows)) for rows in both]
        back = torch.argsort(torch.cat(both))
        return Scores(*(torch.cat(own)[back] for own in zip(*parts, strict=True)))

    def _answer(
        self, dense: Tensor, values: Tensor, lengths: Tensor, ids: Tensor, snapshots: Sequence[Snapshot]
    ) -> Scores:
        versions = torch.stack([own.versions[column] for own, column in zip(snapshots, ids.unbind(1), strict=True)], 1)
        places = self._places(ids, snapshots)
        first = places[:, 0]
        if not self.manifest.has_backbone and bool((versions == 0).any()):
            raise ValueError("a row's domain is unknown, and the method was trained without a backbone of its own")
        logits = self.run_model(dense, values, lengths, places)
        affine = self._calibration.index_select(0, first)
        return Scores(logits, logits.double() * affine[:, 0] + affine[:, 1], versions)

    @property
    def folder(self) -> str:
        """The bundle's."""
        return self.store.bundle

    def known(self, domains: Domains) -> Tensor:
        """Which rows' domains, given as to :meth:`score`, have an adapter at this moment; bool [B, V]."""
        self._watch()
        numbers = self._ids(domains)
        return torch.stack([own.has(column) for own, column in zip(self._residents, numbers.unbind(1), strict=True)], 1)

    def places(self, ids: Tensor) -> Tensor:
        """Where the adapters of domains int64 [B, V] lie at this moment, as the model takes it."""
        with ExitStack() as stack:
            columns = zip(self._residents, ids.unbind(1), strict=True)
            return self._places(ids, [stack.enter_context(own.reading(column)) for own, column in columns])

    def _places(self, ids: Tensor, snapshots: Sequence[Snapshot]) -> Tensor:
        columns = [own.places[column] for own, column in zip(snapshots, ids.unbind(1), strict=True)]
        if len(snapshots) > 1:
            known = [torch.where(place > 0, column, -1) for place, column in zip(columns, ids.unbind(1), strict=True)]
            columns.append(combination_rows(columns[0], torch.stack(known[1:], 1), self.manifest.sizes[1:]))
        return torch.stack(columns, 1)
