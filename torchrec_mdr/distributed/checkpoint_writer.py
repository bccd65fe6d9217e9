"""Writing a distributed checkpoint: at once, or in the background while training goes on."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager

from torchrec_mdr.distributed.checkpoint_store import StoreWriter, remove_checkpoint
from torchrec_mdr.distributed.environment import Environment, free_memory, on_main
from torchrec_mdr.storage import digest_of, is_store, write_digests, write_json

INFO_FILE = "stage.json"
WRITING = ".writing"  # ends the names of folders that a save has not finished
State = dict[str, Any]  # tensors, plain or sharded, by name


def save(folder: str, state: State, info: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
    """Writes a checkpoint; called by all ranks.

    On disk it comes into being by a rename, and one of that name stays in reach until then. In a store it counts from
    its `digests.json` on, which the main process writes last; one of that name is removed first.

    Args:
        folder (str): replaced where it exists.
        state (State): tensors by name; plain ones are the same on all ranks.
        info (Mapping): what `stage.json` holds.
        check (Callable): called on the main process before anything is written; what it raises, all ranks raise.

    Raises:
        ValueError: it cannot be written, on all ranks.
    """
    on_main(check)
    with _sentence(folder):
        attempt = _begin(folder, check)
        dcp.save(detached(state), checkpoint_id=attempt.checkpoint_id, storage_writer=attempt.writer)
        attempt.end(info)


def save_async(
    folder: str,
    state: State,
    info: Mapping[str, Any],
    group: dist.ProcessGroup,
    check: Callable[[], None] = lambda: None,
) -> Future[None]:
    """Begins to write a checkpoint, which a thread goes on with; called by all ranks.

    Args:
        folder (str): see :func:`save`.
        state (State): is copied before the call returns.
        info (Mapping): see :func:`save`.
        group (dist.ProcessGroup): of all ranks, on CPU, that nothing else uses until the result is there.
        check (Callable): see :func:`save`.

    Returns:
        Future: its result is there when the checkpoint is; ValueError where it cannot be written.
    """
    on_main(check)
    with _sentence(folder):
        attempt = _begin(folder, check)
        written = dcp.async_save(
            state,
            checkpoint_id=attempt.checkpoint_id,
            storage_writer=attempt.writer,
            process_group=group,
            async_stager=_Copies(),
        )
    result: Future[None] = Future()

    def end(written: Future[Any]) -> None:
        try:
            with _sentence(folder):
                written.result()
                attempt.end(info, group)
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    written.add_done_callback(end)  # type: ignore[union-attr]
    return result


def fits_again(state: State, environment: Environment) -> bool:
    """Whether copies of all ranks' tensors take at most half of the memory that this machine has left."""
    own = 0
    for tensor in state.values():
        pieces = [shard.tensor for shard in tensor.local_shards()] if isinstance(tensor, ShardedTensor) else [tensor]
        own += sum(piece.numel() * piece.element_size() for piece in pieces)
    ranks = environment.local_world_size or environment.world_size
    return own * ranks <= free_memory() // 2


class _Copies(AsyncStager):
    """Copies of tensors in main memory, sharded ones too, which torch's own stager refuses."""

    _synchronize_after_execute = False

    def stage(self, state_dict: State) -> State:
        """See AsyncStager."""
        with torch.no_grad():
            return {name: value.clone().cpu() for name, value in detached(state_dict).items()}

    def synchronize_staging(self) -> None:
        """The copies are there when :meth:`stage` returns."""

    def close(self) -> None:
        """Nothing is kept."""


class _Attempt(Protocol):
    """A checkpoint that is being written."""

    checkpoint_id: str  # where DCP writes
    writer: StoreWriter | None  # by what; its own for files on disk

    def end(self, info: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """Adds `stage.json` and digests: from now on the checkpoint counts. Called by all ranks."""


class _OnDisk(_Attempt):
    """Written under another name, and then renamed."""

    writer = None

    def __init__(self, folder: str, temporary: str) -> None:
        self.folder, self.checkpoint_id = folder, temporary

    @staticmethod
    def begin(folder: str) -> str:
        """An empty folder for what is being written; what an earlier attempt left is removed."""
        for left in glob.glob(f"{glob.escape(folder)}.*{WRITING}"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = f"{folder}.{uuid.uuid4().hex[:8]}{WRITING}"
        os.makedirs(temporary)
        return temporary

    def end(self, info: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
        folder, temporary = self.folder, self.checkpoint_id
        digests = _gathered(lambda: _digests_of_shards(temporary), group)

        def end() -> None:
            write_json(os.path.join(temporary, INFO_FILE), info)
            names = [name for name in os.listdir(temporary) if name not in digests]
            write_digests(temporary, digests | {name: digest_of(os.path.join(temporary, name)) for name in names})
            if os.path.isdir(folder):  # it stays in reach until the new one is whole
                os.rename(folder, f"{temporary}.old{WRITING}")
            os.rename(temporary, folder)
            shutil.rmtree(f"{temporary}.old{WRITING}", ignore_errors=True)

        on_main(end, group=group)


class _InStore(_Attempt):
    """Written under its own name, which counts from its digests on."""

    def __init__(self, folder: str, name: str, check: Callable[[], None]) -> None:
        self.checkpoint_id, self._check = folder, check
        self.writer = StoreWriter(folder, name)

    @staticmethod
    def begin(folder: str) -> str:
        """A name for the attempt; what an earlier one left, and a checkpoint of the same name, are removed."""
        remove_checkpoint(folder)
        return uuid.uuid4().hex[:8]

    def end(self, info: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
        assert self.writer is not None
        made = self.writer.digests
        digests = _gathered(lambda: made, group)

        def end() -> None:
            self._check()  # uploading may have taken long
            path = os.path.join(self.checkpoint_id, INFO_FILE)
            write_json(path, info)
            write_digests(self.checkpoint_id, digests | {INFO_FILE: digest_of(path)})

        on_main(end, group=group)


def _begin(folder: str, check: Callable[[], None]) -> _Attempt:
    """Makes ready for a checkpoint; called by all ranks."""
    if is_store(folder):
        return _InStore(folder, on_main(lambda: _InStore.begin(folder)), check)
    return _OnDisk(folder, on_main(lambda: _OnDisk.begin(folder)))


@contextmanager
def _sentence(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, CheckpointException) as error:
        mend = "mend that" if is_store(folder) else "make room or name another folder"
        raise ValueError(
            f"checkpoint {folder} cannot be written ({first_line(cause(error))}); {mend}, then go on with --resume"
        ) from error


def _digests_of_shards(folder: str) -> dict[str, str]:
    """Digests of the files with tensors that this rank wrote."""
    own = [name for name in os.listdir(folder) if name.startswith(f"__{dist.get_rank()}_")]
    return {name: digest_of(os.path.join(folder, name)) for name in own}


def _gathered(work: Callable[[], dict[str, str]], group: dist.ProcessGroup | None) -> dict[str, str]:
    """What work() returns on all ranks, together."""
    made: dict[str, str] | ValueError
    try:
        made = work()
    except ValueError as error:
        made = error  # raised on all ranks, and not while others wait
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, made, group=group)
    for one in found:
        if isinstance(one, ValueError):
            raise one
    return {name: digest for one in found for name, digest in one.items()}


def cause(error: BaseException) -> BaseException:
    """What a rank failed of; DCP's own error has all ranks' tracebacks in its text."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def detached(state: State) -> State:
    """The same tensors, as DCP takes them."""
    return {name: tensor if isinstance(tensor, ShardedTensor) else tensor.detach() for name, tensor in state.items()}


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
