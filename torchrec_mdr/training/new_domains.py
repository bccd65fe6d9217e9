"""Loads a checkpoint into a model that has more domains than the checkpoint knew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.norm import CombinationNormBank
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.model import MultiDomainModel

NO_WEIGHT = -30.0  # logit of an expert that no gate has been trained for


def check_new_domains(
    path: str, stored: dict[str, list[str]], mine: dict[str, list[str]], trained: list[int] | None
) -> None:
    """Checks that a run's divisions are a checkpoint's with new domains at the end of the natural one.

    Args:
        path (str): the checkpoint.
        stored (dict[str, list[str]]): its divisions and their domain names, the natural one first.
        mine (dict[str, list[str]]): the run's.
        trained (list[int] | None): the domains that the run trains.

    Raises:
        ValueError: they are not, or a new domain is not among those that are trained.
    """
    natural = next(iter(mine))
    fits = list(stored) == list(mine) and all(stored[name] == mine[name] for name in mine if name != natural)
    old = stored.get(natural, [])
    if not fits or mine[natural][: len(old)] != old:
        raise ValueError(
            f"checkpoint {path} has adapters of the divisions {_describe(stored)}, this run has {_describe(mine)}; "
            "choose the same divisions, put new domains last, or start from a checkpoint of the stage pretrain"
        )
    new = set(range(len(old), len(mine[natural])))
    if new - set(trained or []):
        raise ValueError(
            f"the domains {sorted(new)} of division '{natural}' are not in checkpoint {path}; name them with --domains"
        )


@torch.no_grad()
def load_with_new_domains(path: str, state: checkpoint.State, model: MultiDomainModel) -> None:
    """Loads a checkpoint whose natural division has fewer domains; every old row gets its old value.

    New rows start like this: adapters as new ones (they add zero), norms as the stage starts them, embeddings as the
    mean of their table's old rows, a gate's view of a new domain as the mean of the old ones'. No gate gives weight to
    a new domain's expert before the stage `gate` is run again.

    Args:
        path (str): the checkpoint.
        state (State): tensors to load into, by the names they have in the model.
        model (MultiDomainModel): the model they belong to.

    Raises:
        ValueError: a tensor is missing, or differs by more than new rows.
    """
    sizes = checkpoint.stored_sizes(path)
    same: checkpoint.State = {}
    for name, target in state.items():
        stored = tuple(sizes[name][0]) if name in sizes else None
        wanted = tuple(target.size())
        if not wanted or stored is None or stored[1:] != wanted[1:] or stored[0] >= wanted[0]:
            same[name] = target  # loads, or is refused, as ever
            continue
        old = torch.empty(stored, dtype=sizes[name][1])
        checkpoint.load(path, {name: old})
        _grow(old, target, model, name)
    checkpoint.load(path, same)


def _grow(old: Tensor, target: Any, model: MultiDomainModel, name: str) -> None:
    module_name, _, role = name.rpartition(".")
    if isinstance(target, ShardedTensor):
        for shard in target.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            known = old[row : row + rows, column : column + columns]
            shard.tensor.copy_(old.mean(0)[column : column + columns].expand(rows, -1))
            shard.tensor[: known.shape[0]].copy_(known)
        return
    module = model.get_submodule(module_name) if "embedding_bags" not in module_name else None
    slots = 1
    if isinstance(module, Bank) and not isinstance(module, CombinationNormBank):
        slots = module.num_adapters // model.divisions[module.division].num_domains
    elif isinstance(module, nn.Linear):  # a gate's, with one row per expert
        slots = module.out_features // model.divisions[0].num_domains
        if role == "bias":
            target.fill_(NO_WEIGHT)
    elif not isinstance(module, Bank):
        target.copy_(old.mean(0).expand_as(target))
    parts = old.view(slots, -1, *old.shape[1:])
    target.view(slots, -1, *target.shape[1:])[:, : parts.shape[1]].copy_(parts)


def _describe(divisions: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} ({len(domains)} domains)" for name, domains in divisions.items())
