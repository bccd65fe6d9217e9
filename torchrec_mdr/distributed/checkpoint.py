"""Distributed checkpoints: of a finished stage, and of a stage under way.

A checkpoint is a folder in torch.distributed.checkpoint's format with `stage.json` beside it. It comes into being by a
rename, so a folder of that name is always whole; it loads at any world size and sharding.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_mdr.distributed.old_names import converted_sizes, old_tensors
from torchrec_mdr.storage import write_json

INFO_FILE = "stage.json"
State = dict[str, Any]  # tensors, plain or sharded, by name


def save(folder: str, state: State, info: Mapping[str, Any]) -> None:
    """Writes a checkpoint; called by all ranks.

    Args:
        folder (str): replaced where it exists.
        state (State): tensors by name; plain ones are the same on all ranks.
        info (Mapping): what `stage.json` holds.
    """
    temporary = f"{folder}.writing"
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    dist.barrier()
    dcp.save(_detached(state), checkpoint_id=temporary)
    if main:
        write_json(os.path.join(temporary, INFO_FILE), info)
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    dist.barrier()


def read_info(folder: str) -> dict[str, Any]:
    """What `stage.json` of a checkpoint holds.

    Raises:
        ValueError: there is no such checkpoint, or it cannot be read.
    """
    path = os.path.join(folder, INFO_FILE)
    try:
        with open(path) as file:
            info: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no checkpoint of a stage: {INFO_FILE} cannot be read ({error})") from error
    return info


def stored_sizes(folder: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and type of every tensor of a checkpoint, by the names of today.

    Raises:
        ValueError: the folder holds no readable checkpoint.
    """
    return converted_sizes(_raw_sizes(folder))


def _raw_sizes(folder: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:  # DCP raises what pickle and the file system raise
        raise ValueError(f"{folder} is no readable distributed checkpoint ({type(error).__name__}: {error})") from error
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(folder: str, state: State) -> None:
    """Loads tensors in place from a checkpoint that holds all of them; called by all ranks.

    Raises:
        ValueError: a tensor is missing, has another size, or a file is damaged.
    """
    raw = _raw_sizes(folder)
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
        dcp.load({**_detached(direct), **old}, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:  # the latter is none, and its text is all ranks' tracebacks
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(f"checkpoint {folder} is damaged ({_first_line(cause)}); use another one") from error
    with torch.no_grad():
        for name, one in renamed.items():
            state[name].copy_(one.convert(old[one.name]))


def load_new(folder: str, prefix: str, device: torch.device) -> State:
    """The checkpoint's plain tensors whose names start with a prefix, which is cut off."""
    sizes = stored_sizes(folder)
    names = [name for name in sizes if name.startswith(prefix)]
    state: State = {name: torch.empty(sizes[name][0], dtype=sizes[name][1], device=device) for name in names}
    load(folder, state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def model_state(model: nn.Module) -> State:
    """All parameters and buffers by the names they have in the MultiDomainModel.

    Args:
        model (nn.Module): a DistributedModelParallel around a TrainModule.
    """
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def load_state_dict_file(path: str, state: State) -> None:
    """Loads a plain `state_dict` file of the backbone into a model's state, strictly.

    Args:
        path (str): what `torch.save(backbone.state_dict(), path)` wrote.
        state (State): the backbone's tensors, plain or sharded, by the backbone's own names.

    Raises:
        ValueError: no such file, not a state_dict, or names and sizes that are not the backbone's.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} is no state_dict file ({_first_line(error)})") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} is no state_dict file: it holds no dictionary of tensors")
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
            _copy(loaded[name], target)


def _detached(state: State) -> State:
    return {name: tensor if isinstance(tensor, ShardedTensor) else tensor.detach() for name, tensor in state.items()}


def _copy(source: Tensor, target: Any) -> None:
    if isinstance(target, ShardedTensor):
        for piece in target.local_shards():
            (row, column), (rows, columns) = piece.metadata.shard_offsets, piece.metadata.shard_sizes
            piece.tensor.copy_(source[row : row + rows, column : column + columns])
    else:
        target.copy_(source)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
