"""Loads a checkpoint into a model that has more domains than the checkpoint knew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_mdr.adapters.domain_module import DomainModule
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.model import MultiDomainModel

StoredDivisions = Mapping[str, Any]  # by name: the domains' names, or their number where they have none


def stored_divisions(divisions: Sequence[Division]) -> dict[str, Any]:
    """What a checkpoint keeps of a model's divisions.

    Example::

        >>> stored_divisions([Division("scenario", 3), Division("gender", names=["F", "M"])])
        {'scenario': 3, 'gender': ['F', 'M']}
    """
    return {d.name: d.num_domains if d.names is None else list(d.names) for d in divisions}


def check_divisions(
    path: str, stored: StoredDivisions, mine: Sequence[Division], trained: Sequence[int] | None
) -> bool:
    """Checks that a run's divisions are a checkpoint's, or have new domains at the end of the natural one.

    Domains are matched by their names where both sides know them, and by their place otherwise.

    Args:
        path (str): the checkpoint.
        stored (Mapping): its divisions, see :func:`stored_divisions`, the natural one first.
        mine (Sequence[Division]): the run's.
        trained (Sequence[int] | None): the domains that the run trains.

    Returns:
        bool: whether there are new domains.

    Raises:
        ValueError: other divisions, names in another order, or a new domain that is not trained.
    """
    names = [division.name for division in mine]
    if list(stored) != names:
        raise ValueError(
            f"checkpoint {path} has adapters of the divisions {', '.join(stored)}, this run has {', '.join(names)}; "
            "choose the same divisions, or start from a checkpoint of the stage pretrain"
        )
    for division in mine:
        _check_names(path, division, stored[division.name])
    natural = mine[0]
    sizes = {name: len(domains) if isinstance(domains, list) else domains for name, domains in stored.items()}
    for division in mine:
        grows = division is natural and sizes[division.name] < division.num_domains
        if not grows and sizes[division.name] != division.num_domains:
            raise ValueError(
                f"checkpoint {path} has {sizes[division.name]} domains of division '{division.name}', this run has "
                f"{division.num_domains}; only the natural division may have new domains, and none may go"
            )
    new = range(sizes[natural.name], natural.num_domains)
    if set(new) - set(trained or []):
        raise ValueError(
            f"the domains {list(new)} of division '{natural.name}' are not in checkpoint {path}; name them with "
            "--domains"
        )
    return len(new) > 0


def _check_names(path: str, division: Division, stored: list[str] | int) -> None:
    if not isinstance(stored, list) or division.names is None:
        return
    for place, (old, mine) in enumerate(zip(stored, division.names, strict=False)):
        if old != mine:
            moved = "is in another order" if mine in stored else "has other domains"
            raise ValueError(
                f"checkpoint {path}: domain {place} of division '{division.name}' is '{old}' there and '{mine}' here, "
                f"so the list {moved}; keep the old domains in their order, and put new ones last"
            )


@torch.no_grad()
def load_with_new_domains(path: str, state: checkpoint.State, model: MultiDomainModel) -> None:
    """Loads a checkpoint whose natural division has fewer domains; every old row gets its old value.

    What becomes of new rows the modules say, see :class:`DomainModule`: adapters are new ones (they add zero), norms
    what the stage starts them with; embeddings are the mean of their table's old rows. No gate gives weight to a new
    domain's expert before the stage `gate` is run again.

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
        _fill(old, target, model, name)
    checkpoint.load(path, same)


def _fill(old: Tensor, target: Any, model: MultiDomainModel, name: str) -> None:
    if isinstance(target, ShardedTensor):
        for shard in target.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            known = old[row : row + rows, column : column + columns]
            shard.tensor.copy_(old.mean(0)[column : column + columns].expand(rows, -1))
            shard.tensor[: known.shape[0]].copy_(known)
        return
    owner, own_name = _owner(model, name)
    if owner is not None:
        owner.load_old_domains(own_name, old, target, model.divisions[0].num_domains)
        return
    target.copy_(old.mean(0).expand_as(target))
    target[: len(old)].copy_(old)


def _owner(model: MultiDomainModel, name: str) -> tuple[DomainModule | None, str]:
    """The innermost module around a tensor that says what becomes of its domains, and the tensor's name below it."""
    parts = name.split(".")
    modules = dict(model.named_modules())
    for length in range(len(parts) - 1, 0, -1):
        module = modules.get(".".join(parts[:length]))
        if isinstance(module, DomainModule):
            return module, ".".join(parts[length:])
    return None, name
