"""Checkpoints in a store that fails now and then, and in one that fails for good."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.storage.proxy import Proxy
from tests.storage.runs import forget_stores
from torchrec_mdr.distributed import checkpoint, checkpoint_writer
from torchrec_mdr.distributed.environment import process_group
from torchrec_mdr.storage import handlers, is_whole, ls, read_bytes, read_digests, write_bytes

STATE = {"large": torch.arange(3_000_000.0), "small": torch.arange(12.0).view(4, 3), "one": torch.tensor(7)}


def same_state(folder: str) -> bool:
    found = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    checkpoint.load(folder, found)
    return all(torch.equal(tensor, found[name]) for name, tensor in STATE.items())


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 5 MiB are sent in parts."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "default_block_size", 5 << 20)


def test_what_breaks_off_is_tried_again(parts: None, store: str, between: Proxy) -> None:
    between.share = 0.2
    number = 0
    with process_group():
        while number < 2 or not all(between.happened[fault] for fault in between.faults):
            folder, number = f"{store}/{number}", number + 1
            checkpoint.save(folder, STATE, {"number": number})
            assert is_whole(folder) and same_state(folder)
            assert checkpoint.read_info(folder)["number"] == number


def test_a_checkpoint_that_cannot_be_finished_is_none(parts: None, store: str, between: Proxy) -> None:
    folder = f"{store}/step"
    with process_group():
        begin = checkpoint_writer._InStore.begin

        def denied(folder: str) -> str:
            name = begin(folder)
            between.mode = "denied"
            return name

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(checkpoint_writer._InStore, "begin", staticmethod(denied))
            with pytest.raises(ValueError, match=rf"checkpoint {folder} cannot be written .*access denied") as error:
                checkpoint.save(folder, STATE, {})
        assert "\n" not in str(error.value)
        between.mode = None
        write_bytes(f"{folder}/__0_dead_0.distcp", b"half")  # as a kill leaves it
        assert not is_whole(folder)
        checkpoint.save(folder, STATE, {})
        assert same_state(folder)
        assert set(ls(folder)) == {*(read_digests(folder) or {}), "digests.json"}


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content[:-9] + b"x" + content[-8:]])
def test_every_file_is_checked(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    folder = f"memory://{tmp_path.name}/step"
    with process_group():
        checkpoint.save(folder, STATE, {})
        for name in read_digests(folder) or {}:
            content = read_bytes(f"{folder}/{name}")
            write_bytes(f"{folder}/{name}", change(content))
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                checkpoint.load(folder, dict(STATE))
            write_bytes(f"{folder}/{name}", content)
        assert same_state(folder)


@pytest.mark.parametrize("mode", ["silent", "503"])
def test_a_store_that_does_not_come_back_is_given_up_in_time(
    mode: str, store: str, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = handlers._S3["config_kwargs"]
    assert settings["read_timeout"] == 30 and settings["retries"]["total_max_attempts"] == 6, "docs/storage.md"
    quick = {**settings, "read_timeout": 0.4, "retries": {"total_max_attempts": 3, "mode": "standard"}}
    write_bytes(f"{store}/a", b"content")
    monkeypatch.setitem(handlers._S3, "config_kwargs", quick)
    monkeypatch.setattr(handlers, "REREAD_SECONDS", 0.5)
    forget_stores()
    between.mode = mode
    for work in (lambda: read_bytes(f"{store}/a"), lambda: write_bytes(f"{store}/b", b"other")):
        began = time.monotonic()
        with pytest.raises(ValueError, match=f"{store}/[ab] cannot be (read|written): the store fails"):
            work()
        assert time.monotonic() - began < 120
