"""Distributed checkpoints: of a finished stage, and of a stage under way.

A checkpoint is a folder in torch.distributed.checkpoint's format with `stage.json` and `digests.json` beside it. On
disk it comes into being by a rename, so a folder of that name is always whole; in a store it counts from its
`digests.json` on. It loads at any world size and sharding. Every file is checked against its digest when it is loaded.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_mdr.distributed.checkpoint_store import reader_of
from torchrec_mdr.distributed.checkpoint_writer import INFO_FILE, State, cause, first_line
from torchrec_mdr.distributed.checkpoint_writer import detached as detached
from torchrec_mdr.distributed.checkpoint_writer import fits_again as fits_again
from torchrec_mdr.distributed.checkpoint_writer import save as save
from torchrec_mdr.distributed.checkpoint_writer import save_async as save_async
from torchrec_mdr.distributed.environment import on_every
from torchrec_mdr.distributed.old_names import converted_sizes, old_tensors
from torchrec_mdr.storage import StoreFails, damaged_files, isfile, local_copy, read_digests, read_json, stamp

METADATA_FILE = ".metadata"  # DCP's name

logger = logging.getLogger(__name__)
_good: dict[str, str] = {}  # files that had their digest, with what would change with their content
_told: set[str] = set()  # checkpoints without digests that a log line has named


def read_info(folder: str, *entries: str) -> dict[str, Any]:
    """What `stage.json` of a checkpoint holds.

    Args:
        folder (str): the checkpoint.
        *entries: what has to be in it.

    Raises:
        ValueError: there is no such checkpoint, it cannot be read, is damaged, or lacks an entry.
    """
    _raise_first(_damaged(folder, [INFO_FILE]))
    try:
        info = read_json(os.path.join(folder, INFO_FILE))
    except StoreFails:
        raise
    except ValueError as error:
        raise ValueError(f"{folder} is no checkpoint of a stage: {INFO_FILE} cannot be read ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{folder} is no checkpoint of a stage: {INFO_FILE} holds a {type(info).__name__}")
    for entry in entries:
        if not isinstance(info.get(entry), dict | list):
            raise ValueError(f"{folder} is no whole checkpoint of a stage: {INFO_FILE} has no '{entry}'")
    return info


def stored_sizes(folder: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and type of every tensor of a checkpoint, by the names of today.

    Raises:
        ValueError: the folder holds no readable checkpoint.
    """
    return converted_sizes(_raw_sizes(folder))


def _raw_sizes(folder: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    _raise_first(_damaged(folder, [METADATA_FILE]))
    try:
        metadata = reader_of(folder).read_metadata()
    except Exception as error:  # DCP raises what pickle and the file system raise
        raise ValueError(f"{folder} is no readable distributed checkpoint ({type(error).__name__}: {error})") from error
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(folder: str, state: State) -> None:
    """Loads tensors in place from a checkpoint of all of them; called by all ranks, or without a process group.

    Raises:
        ValueError: a tensor is missing, has another size, or a file is damaged.
    """
    raw = on_every(lambda: _raw_sizes(folder))
    check_files(folder)
    sizes, renamed = converted_sizes(raw), {name: old for name, old in old_tensors(raw).items() if name in state}
    for name, tensor in state.items():
        if name not in sizes:
            raise ValueError(f"checkpoint {folder} is of another model: it lacks '{name}'")
        size = tensor.size()
        if tuple(sizes[name][0]) != tuple(size):
            raise ValueError(
                f"checkpoint {folder} is of another model or division: '{name}' is {list(sizes[name][0])} there and "
                f"{list(size)} here"
            )
    direct = {name: tensor for name, tensor in state.items() if name not in renamed}
    old = {one.name: torch.empty(*raw[one.name][:1], dtype=raw[one.name][1]) for one in renamed.values()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process without a group
            dcp.load({**detached(direct), **old}, checkpoint_id=folder, storage_reader=reader_of(folder))
    except (Exception, CheckpointException) as error:  # the latter is none, and its text is all ranks' tracebacks
        raise ValueError(f"checkpoint {folder} is damaged ({first_line(cause(error))}); use another one") from error
    with torch.no_grad():
        for name, one in renamed.items():
            state[name].copy_(one.convert(old[one.name]))


def load_new(folder: str, prefix: str, device: torch.device, without: str | None = None) -> State:
    """The checkpoint's plain tensors whose names start with a prefix, which is cut off, but not with another one.

    Called by all ranks, or without a process group.
    """
    sizes = on_every(lambda: stored_sizes(folder))
    names = [name for name in sizes if name.startswith(prefix) and not (without and name.startswith(without))]
    state: State = {name: torch.empty(sizes[name][0], dtype=sizes[name][1], device=device) for name in names}
    load(folder, state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def model_state(model: nn.Module) -> State:
    """All parameters and buffers by the names they have in the MultiDomainModel.

    Args:
        model (nn.Module): a DistributedModelParallel around a MultiDomainTrain.
    """
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def load_state_dict_file(path: str, state: State) -> None:
    """Loads a plain `state_dict` file of the backbone into a model's state, strictly.

    Args:
        path (str): what `torch.save(backbone.state_dict(), path)` wrote; called by all ranks.
        state (State): the backbone's tensors, plain or sharded, by the backbone's own names.

    Raises:
        ValueError: no such file, not a state_dict, or names and sizes that are not the backbone's.
    """
    loaded = on_every(lambda: _read_state_dict(path))
    missing, unknown = sorted(set(state) - set(loaded)), sorted(set(loaded) - set(state))
    if missing or unknown:
        what = f"lacks '{missing[0]}'" if missing else f"has '{unknown[0]}', which this backbone has not"
        raise ValueError(f"{path} is of another model: it {what} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, target in state.items():
        if tuple(loaded[name].shape) != tuple(target.size()):
            raise ValueError(
                f"{path} is of another model: '{name}' is {list(loaded[name].shape)} there, {list(target.size())} here"
            )
    with torch.no_grad():
        for name, target in state.items():
            copy_tensor(loaded[name], target)


def _read_state_dict(path: str) -> dict[str, Tensor]:
    local = local_copy(path)
    try:
        loaded = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{path} is no state_dict file ({first_line(error)}); save backbone.state_dict() by torch.save"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} is no state_dict file: it holds no dictionary of tensors; save backbone.state_dict()")
    return loaded


def check_files(folder: str) -> None:
    """Checks every file against its digest, where there are digests; called by all ranks, which share the reading.

    Raises:
        ValueError: a file is not what was written.
        StoreFails: the store does, so that they may be sound.
    """
    together = dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    try:
        found: list[Any] = [_damaged(folder, None, rank, ranks)]
    except StoreFails as error:
        found = [error]
    if together:
        own, found = found[0], [None] * ranks
        dist.all_gather_object(found, own)
    for one in found:
        if isinstance(one, StoreFails):
            raise one
    _raise_first([sentence for one in found for sentence in one])


def _damaged(folder: str, names: list[str] | None, rank: int = 0, ranks: int = 1) -> list[str]:
    """A sentence for each file that is not what was written, of those named or of a rank's share of all."""
    try:
        digests = read_digests(folder)
    except StoreFails:
        raise
    except ValueError as error:
        return [str(error)]
    if digests is None:
        if names is None and folder not in _told and isfile(os.path.join(folder, INFO_FILE)):
            _told.add(folder)
            logger.info("checkpoint %s is of an older version, without digests: its files are not checked", folder)
        return []
    wrong = []
    for name in names if names is not None else sorted(digests)[rank::ranks]:
        path = os.path.join(folder, name)
        seen = _stamp(path)
        if seen is not None and _good.get(path) == seen:
            continue
        found = damaged_files(folder, digests, [name])
        if seen is not None and not found:
            _good[path] = seen
        wrong += found
    return wrong


def _stamp(path: str) -> str | None:
    """What changes with a file's content; None where there is none, or its store cannot tell."""
    try:
        return stamp(path)
    except ValueError:
        return None


def _raise_first(wrong: list[str]) -> None:
    if wrong:
        raise ValueError(f"{wrong[0]}; use another checkpoint, or a copy of this one")


def copy_tensor(source: Tensor, target: Any) -> None:
    """Copies a whole tensor into a plain one, or into this rank's shards of one."""
    if isinstance(target, ShardedTensor):
        for piece in target.local_shards():
            place = zip(piece.metadata.shard_offsets, piece.metadata.shard_sizes, strict=True)
            piece.tensor.copy_(source[tuple(slice(start, start + size) for start, size in place)])
    else:
        target.copy_(source)
