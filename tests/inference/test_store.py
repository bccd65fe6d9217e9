"""Versions of adapters on disk, whoever puts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchrec_mdr.inference import store
from torchrec_mdr.inference.adapter_file import AdapterFile, AdapterInfo
from torchrec_mdr.inference.store import AdapterStore

ADAPTER = AdapterFile(AdapterInfo("mlora", "shop", "home", "0" * 32), {"layer.bias": torch.ones(2)})


def test_a_put_costs_the_same_however_many_versions_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    monkeypatch.setattr(store, "ls", lambda folder, ls=store.ls: listed.append(folder) or ls(folder))
    ours = AdapterStore(str(tmp_path))
    ours.put_all(iter([ADAPTER]))
    assert [ours.put(ADAPTER) for _ in range(20)] == list(range(2, 22))
    assert len(listed) == 1


def test_no_version_is_used_twice_where_several_put_and_one_is_killed(tmp_path: Path) -> None:
    ours, theirs = AdapterStore(str(tmp_path)), AdapterStore(str(tmp_path))
    ours.put_all(iter([ADAPTER]))
    assert [ours.put(ADAPTER), theirs.put(ADAPTER), theirs.put(ADAPTER), ours.put(ADAPTER)] == [2, 3, 4, 5]
    left = Path(ours.path("shop", "home", 6))
    left.write_bytes(b"of a process that was killed before its version served")
    assert ours.put(ADAPTER) == 7 and left.read_bytes().startswith(b"of a process")
    theirs.rollback("shop", "home")
    theirs.remove("shop", "home")
    assert ours.put(ADAPTER) == 8 and ours.verify() == []
