"""The adapters of a bundle: immutable versions, and one file that says which of them serve."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

from torchrec_mdr.inference.adapter_file import AdapterFile, read_adapter, sha256
from torchrec_mdr.storage import (
    create,
    digest_of,
    exclusive,
    located,
    ls,
    make_folder,
    read_json,
    replace,
    stamp,
    write_text,
)

CURRENT_FILE, LOCK_FILE = "current.json", ".lock"
_VERSION = re.compile(r"(\d+)\.safetensors")


MOST_BEFORE = 20  # versions that can be rolled back to


class Serving(NamedTuple):
    """Which version of a domain's adapter serves.

    Args:
        version (int): counted from 1, never used twice.
        sha256 (str): of its file.
        before (Sequence[Sequence[Any]]): version and hash of those that served before it, the last one last.
        pinned (bool): whether scorers keep it resident.
    """

    version: int
    sha256: str
    before: Sequence[Sequence[Any]] = ()
    pinned: bool = False


@dataclass(frozen=True)
class Current:
    """What `current.json` says.

    Args:
        generation (int): grows with every change.
        serving (dict[str, dict[str, Serving]]): by division and domain.
    """

    generation: int = 0
    serving: dict[str, dict[str, Serving]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps({"generation": self.generation, "serving": self.serving}, ensure_ascii=False)

    @staticmethod
    def read(path: str) -> Current:
        """Reads the file.

        Raises:
            ValueError: it is missing or damaged.
        """
        content = read_json(path)
        try:
            serving = {
                division: {domain: Serving(*own) for domain, own in domains.items()}
                for division, domains in content["serving"].items()
            }
            return Current(int(content["generation"]), serving)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a backup, or export the bundle") from error


class AdapterStore:
    """The folder `adapters/DIVISION/DOMAIN/VERSION.safetensors` of a bundle and its `current.json`.

    Any number of processes may read and change it: changes take a lock, readers see the last whole state.

    Args:
        bundle (str): the bundle's folder, on a disk or in an object store.
    """

    def __init__(self, bundle: str) -> None:
        self.bundle = located(bundle)
        self.current_path = os.path.join(self.bundle, CURRENT_FILE)
        self._read: tuple[str, Current] | None = None  # the last one, and its stamp
        # the newest version of each domain that this object has put to, and the generation that it left last
        self._newest: dict[tuple[str, str], int] = {}
        self._generation = -1

    def path(self, division: str, domain: str, version: int) -> str:
        """Where a version is."""
        return os.path.join(self._folder(division, domain), f"{version:06d}.safetensors")

    def current(self) -> Current:
        """What serves now."""
        read, stamp = self._read, self.stamp()  # before the file is read: a change in between is seen next time
        if read is None or read[0] != stamp:
            read = self._read = stamp, Current.read(self.current_path)
        return read[1]

    def stamp(self) -> str:
        """Changes whenever `current.json` is replaced."""
        try:
            return stamp(self.current_path) or digest_of(self.current_path)
        except ValueError as error:
            raise ValueError(f"{error}; export the run again") from error

    def load(self, division: str, domain: str, version: int) -> AdapterFile:
        """Reads a version."""
        return read_adapter(self.path(division, domain, version))

    def put(self, adapter: AdapterFile) -> int:
        """Writes an adapter as a new version, which serves from then on; it has been checked.

        Returns:
            int: the version.
        """
        division, domain = adapter.info.division, adapter.info.domain
        with self._changing() as current:
            before = current.serving.get(division, {}).get(domain)
            version = self._next(division, domain)
            content = adapter.with_parent(before.version if before else None).to_bytes()
            while not self._write_version(adapter, version, content):
                version += 1
            self._newest[division, domain] = version
            served = [*before.before, (before.version, before.sha256)][-MOST_BEFORE:] if before else []
            own = Serving(version, sha256(content), served, before.pinned if before else False)
            self._set(current, division, domain, own)
        return version

    def put_all(self, adapters: Iterator[AdapterFile]) -> None:
        """Writes the first version of many domains, all of which serve at once."""
        serving: dict[str, dict[str, Serving]] = {}
        for adapter in adapters:
            content = adapter.to_bytes()
            division, domain = adapter.info.division, adapter.info.domain
            self._write_version(adapter, 1, content)
            serving.setdefault(division, {})[domain] = Serving(1, sha256(content))
        self._write(Current(1, serving))

    def rollback(self, division: str, domain: str) -> int:
        """Has the version serve again that served before.

        Returns:
            int: that version.

        Raises:
            ValueError: the domain has no adapter, or never had another.
        """
        with self._changing() as current:
            own = self._serving(current, division, domain)
            if not own.before:
                raise ValueError(f"domain '{domain}' has no version before {own.version}; remove it, or put another")
            version, digest = own.before[-1]
            self._set(current, division, domain, Serving(version, digest, own.before[:-1], own.pinned))
        return version

    def remove(self, division: str, domain: str) -> None:
        """Takes a domain's adapter out: it is unknown from then on. Its files stay.

        Raises:
            ValueError: it has none.
        """
        with self._changing() as current:
            self._serving(current, division, domain)
            del current.serving[division][domain]

    def pin(self, division: str, domain: str, pinned: bool = True) -> None:
        """Has scorers keep a domain's adapter resident, or not any more.

        Raises:
            ValueError: it has none.
        """
        with self._changing() as current:
            own = self._serving(current, division, domain)
            self._set(current, division, domain, Serving(own.version, own.sha256, own.before, pinned))

    def verify(self) -> list[str]:
        """What is wrong with the files that serve, or may again; nothing where all is well."""
        wrong: list[str] = []
        for division, domains in self.current().serving.items():
            for domain, own in domains.items():
                for version, digest in (*own.before, (own.version, own.sha256)):
                    path = self.path(division, domain, version)
                    try:
                        if digest_of(path) != digest:
                            wrong.append(f"{path} is not what was put; restore it, or put it again")
                    except ValueError as error:
                        wrong.append(str(error))
        return wrong

    def _folder(self, division: str, domain: str) -> str:
        return os.path.join(self.bundle, "adapters", escaped(division), escaped(domain))

    def _write_version(self, adapter: AdapterFile, version: int, content: bytes) -> bool:
        """Writes a version's file; gives whether it is new: nothing is written over."""
        division, domain = adapter.info.division, adapter.info.domain
        path = self.path(division, domain, version)
        make_folder(self._folder(division, domain), "--bundle: the folder")
        return create(path, content)

    def _next(self, division: str, domain: str) -> int:
        """The version after the newest; a folder is listed where others may have put to it, since it only grows."""
        if (division, domain) in self._newest:
            return 1 + self._newest[division, domain]
        names = ls(self._folder(division, domain))
        return 1 + max((int(found[1]) for name in names if (found := _VERSION.fullmatch(name))), default=0)

    def _serving(self, current: Current, division: str, domain: str) -> Serving:
        own = current.serving.get(division, {}).get(domain)
        if own is None:
            raise ValueError(f"division '{division}' has no adapter for domain '{domain}'; put one first")
        return own

    def _set(self, current: Current, division: str, domain: str, own: Serving) -> None:
        current.serving.setdefault(division, {})[domain] = own

    @contextmanager
    def _changing(self) -> Iterator[Current]:
        """One change at a time; it counts when the new `current.json` has taken the old one's place."""
        with exclusive(os.path.join(self.bundle, LOCK_FILE)) as held:
            now = self.current()
            before = self._read[0] if self._read else ""  # its stamp
            if now.generation != self._generation:
                self._newest.clear()
            changed = {division: dict(domains) for division, domains in now.serving.items()}
            current = Current(now.generation + 1, changed)
            yield current
            held.check()
            if not replace(self.current_path, current.to_json().encode(), before):
                raise ValueError(f"{self.current_path} has been changed by another process; do it again")
            self._read = self.stamp(), current
            self._generation = current.generation

    def _write(self, current: Current) -> None:
        write_text(self.current_path, current.to_json())


def escaped(name: str) -> str:
    """A name as one part of a path, different for different names.

    Example::

        >>> escaped("home"), escaped("a.b/c"), escaped("..")
        ('home', 'a%2Eb%2Fc', '%2E%2E')
    """
    return quote(name, safe=" $!&()+,;=@~").replace(".", "%2E")


def as_list(current: Current) -> list[dict[str, Any]]:
    """One entry a domain, for tables."""
    return [
        {
            "division": division,
            "domain": domain,
            "version": own.version,
            "pinned": own.pinned,
            "before": [version for version, _ in own.before],
        }
        for division, domains in current.serving.items()
        for domain, own in domains.items()
    ]
