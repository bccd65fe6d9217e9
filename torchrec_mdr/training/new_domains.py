"""Loads a checkpoint into a model that has more domains than the checkpoint knew."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import on_every
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.storage import isfile
from torchrec_mdr.training.stored_banks import StoredBanks

StoredDivisions = Mapping[str, Any]  # by name: the domains' names, or their number where they have none


def stored_divisions(divisions: Sequence[Division]) -> dict[str, Any]:
    """What a checkpoint keeps of a model's divisions.

    Example::

        >>> stored_divisions([Division("scenario", 3), Division("gender", names=["F", "M"])])
        {'scenario': 3, 'gender': ['F', 'M']}
    """
    return {d.name: d.num_domains if d.names is None else list(d.names) for d in divisions}


def stored_groups(path: str, names: Sequence[str]) -> frozenset[ParameterGroup]:
    """The groups of tensors that a checkpoint says it holds.

    Raises:
        ValueError: none, or one that does not exist.
    """
    if not names:
        raise ValueError(f"checkpoint {path} names no groups of tensors in its stage.json, so nothing would be loaded")
    known = {group.value: group for group in ParameterGroup}
    for name in names:
        if name not in known:
            raise ValueError(f"checkpoint {path} is of no stage: its groups name '{name}', not {', '.join(known)}")
    return frozenset(known[name] for name in names)


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
def load_with_new_domains(
    model: nn.Module,
    checkpoint_id: str,
    prefix: str = "",
    *,
    state: checkpoint.State | None = None,
    old_divisions: Sequence[Division] | None = None,
    sources: Tensor | None = None,
) -> None:
    """Loads a checkpoint whose natural division has other domains; every domain that was there gets its old values.

    Domains are matched by name where names are known on both sides, and by place otherwise; then new ones come last.
    What becomes of new ones the modules say, see :class:`DomainModule`: adapters are new ones (they add zero), norms
    what the stage starts them with; embeddings are the mean of their table's old rows. No trained gate gives
    weight to a new domain's expert before the stage `gate` is run again. Called by all ranks.

    Args:
        model (nn.Module): a MultiDomainModel, or what is around it: a DistributedModelParallel, say.
        checkpoint_id (str): the folder that DCP wrote.
        prefix (str): how the names of the model's tensors begin there: `model.` for ``{"model": dmp.state_dict()}``.
        state (State | None): the tensors to load into, by their names in the model; all of them where left out.
        old_divisions (Sequence[Division] | None): those that the checkpoint was made with, where it is none of this
            package's trainer, which says so itself.
        sources (Tensor | None): int64 [N], for each domain which one it was in the checkpoint, -1 for new ones, where
            neither names nor places say that.

    Raises:
        ValueError: no such checkpoint, a tensor that it lacks, or that differs by more than its domains.
    """
    inner = next((module for module in model.modules() if isinstance(module, MultiDomainModel)), None)
    if inner is None:
        raise ValueError(f"there is no MultiDomainModel in this {type(model).__name__}")
    own = model.state_dict() if state is None else state
    targets = {prefix + name: (name, tensor) for name, tensor in own.items()}
    sizes = on_every(lambda: checkpoint.stored_sizes(checkpoint_id))
    if sources is None:
        sources = on_every(lambda: _sources(checkpoint_id, inner.divisions[0], old_divisions))
    modules = dict(get_unwrapped_module(model).named_modules())
    same: checkpoint.State = {}
    banks = StoredBanks(checkpoint_id, inner, prefix)
    for stored_name, (name, target) in targets.items():
        if banks.fills(name):
            banks.fill(name, target, sources)
            continue
        stored = tuple(sizes[stored_name][0]) if stored_name in sizes else None
        wanted = tuple(target.size())
        owner, own_name = _owner(modules, name)
        follows = sources is not None and owner is not None and owner.follows_domains(own_name)
        grows = wanted and stored is not None and stored[1:] == wanted[1:] and stored[0] < wanted[0]
        if stored is None or not (follows or grows):
            same[stored_name] = target  # loads, or is refused, as ever
            continue
        old = torch.empty(stored, dtype=sizes[stored_name][1])
        checkpoint.load(checkpoint_id, {stored_name: old})
        _fill(old, target, owner, own_name, inner.divisions[0].num_domains, sources if follows else None)
    checkpoint.load(checkpoint_id, same)


def _sources(checkpoint_id: str, mine: Division, old_divisions: Sequence[Division] | None) -> Tensor | None:
    """For each domain, which one it was in the checkpoint, -1 for none; None where they are matched by place."""
    names: Any = None
    if old_divisions is not None:
        names = old_divisions[0].names
    elif isfile(os.path.join(checkpoint_id, checkpoint.INFO_FILE)):
        names = checkpoint.read_info(checkpoint_id).get("divisions", {}).get(mine.name)
    if mine.names is None or not isinstance(names, Sequence) or list(names) == list(mine.names):
        return None
    places = {name: place for place, name in enumerate(names)}
    return torch.tensor([places.get(name, -1) for name in mine.names])


def _fill(
    old: Tensor, target: Any, owner: DomainModule | None, name: str, num_domains: int, sources: Tensor | None
) -> None:
    """Fills a tensor; by place where sources are not given."""
    if isinstance(target, ShardedTensor):
        for shard in target.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            known = old[row : row + rows, column : column + columns]
            shard.tensor.copy_(old.mean(0)[column : column + columns].expand(rows, -1))
            shard.tensor[: known.shape[0]].copy_(known)
    elif owner is not None and owner.follows_domains(name):
        if sources is None:
            places = torch.arange(num_domains)
            sources = torch.where(places < len(old) * num_domains // len(target), places, -1)
        owner.load_old_domains(name, old.to(target.device), target, sources.to(target.device))
    else:
        target.copy_(old.mean(0).expand_as(target))
        target[: len(old)].copy_(old)


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[DomainModule | None, str]:
    """The innermost module around a tensor that says what becomes of its domains, and the tensor's name below it."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = modules.get(".".join(parts[:length]))
        if isinstance(module, DomainModule):
            return module, ".".join(parts[length:])
    return None, name
