"""The state of the model that was wrapped, under the names that it had before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_mdr.adapters.domain_module import ParameterGroup
from torchrec_mdr.distributed.checkpoint import copy_tensor
from torchrec_mdr.model import MultiDomainModel, parameter_groups

BACKBONE_GROUPS = ParameterGroup.EMBEDDINGS, ParameterGroup.BACKBONE


@contextmanager
def backbone_state(dmp: nn.Module) -> Iterator[dict[str, Any]]:
    """The tables, the dense part and the fused optimizer's state, as a loop around the unwrapped model has them.

    ``state["model"]`` is what the state dict of the unwrapped model would be, without adapters and gates; around a
    MultiDomainTrain, the names are those around a DLRMTrain.
    ``state["optimizer"]`` is what its fused optimizer's state dict would be; it is left out where there is none. A loop
    that saves ``{"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}`` writes what this reads, and the
    other way round; ``{"model": state["model"]}`` leaves the optimizer aside.

    Tensors are the model's own, plain or sharded: loading into them (``dcp.load``) loads into the model. Entries may
    also be replaced by the whole tensors of a plain file,
    ``state["model"].update(torch.load("dlrm.pt", weights_only=True))``, with or without the prefix of the loss module
    (``model.``); they are copied where the block ends. If something was loaded, what starts from the backbone in the
    prepared stage, norms per domain, takes it up then: so load the backbone before adapters. A model that was never
    wrapped is taken, too.

    Args:
        dmp (nn.Module): a DistributedModelParallel, a MultiDomainTrain or a MultiDomainModel.

    Raises:
        ValueError: an entry that the backbone has not, or of another shape.

    Example::

        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> from torchrec_mdr import Division, MLoRA
        >>> table = EmbeddingBagConfig(name="t_item", embedding_dim=8, num_embeddings=100, feature_names=["item"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [16, 8], [32, 16, 1])
        >>> names = set(dlrm.state_dict())
        >>> model = MultiDomainModel(dlrm, MLoRA(rank=8), divisions=[Division("scenario", 12)])
        >>> with backbone_state(model) as state:
        ...     print(set(state["model"]) == names)
        True
    """
    path, model = _find(dmp)
    long, short = f"{path}backbone.", path
    groups = parameter_groups(dmp)

    def cut(name: str) -> str:
        return short + name.removeprefix(long) if model is not None and name.startswith(long) else name

    own = {cut(name): tensor for name, tensor in dmp.state_dict().items() if groups.get(name) in BACKBONE_GROUPS}
    fused = getattr(dmp, "fused_optimizer", None)
    roles: dict[str, dict[str, Any]] = {}
    if fused is not None:
        roles = {cut(name): dict(entry) for name, entry in fused.state_dict()["state"].items() if entry}
    state: dict[str, Any] = {"model": dict(own)}
    if roles:
        state["optimizer"] = {"state": {name: dict(entry) for name, entry in roles.items()}}
    versions = _versions(own)
    yield state
    replaced = _copy_replaced(state["model"], own, short)
    for name, entry in roles.items():
        _copy_replaced(state.get("optimizer", {}).get("state", {}).get(name, {}), entry, "")
    loaded = replaced or versions != _versions(own)
    if loaded and model is not None and model.frozen is not None and model.frozen.backbone:
        model.start_stage(model.router.route, model.router.division)


def _versions(tensors: dict[str, Any]) -> list[int]:
    """What tells whether something was written into plain tensors."""
    return [tensor._version for tensor in tensors.values() if not isinstance(tensor, ShardedTensor)]


def _find(dmp: nn.Module) -> tuple[str, MultiDomainModel | None]:
    """Where the wrapped model is in what is around it: what its names begin with, and itself."""
    for name, module in get_unwrapped_module(dmp).named_modules():
        if isinstance(module, MultiDomainModel):
            return f"{name}." if name else "", module
    return "", None


@torch.no_grad()
def _copy_replaced(entries: dict[str, Any], own: dict[str, Any], prefix: str) -> bool:
    """Copies entries that are not the model's own tensors any more into those; True where there is one."""
    replaced = False
    for name, value in entries.items():
        target = own.get(name, own.get(prefix + name))
        if target is value:
            continue
        if target is None:
            raise ValueError(f"'{name}' is no tensor of this backbone, whose first is '{next(iter(own), '')}'")
        if isinstance(value, ShardedTensor) or not isinstance(value, Tensor):
            raise ValueError(f"'{name}' was replaced by a {type(value).__name__}; give whole tensors, or load in place")
        if tuple(value.shape) != tuple(target.size()):
            raise ValueError(f"'{name}' is {list(value.shape)} in what is loaded, and {list(target.size())} here")
        copy_tensor(value, target)
        replaced = True
    return replaced
