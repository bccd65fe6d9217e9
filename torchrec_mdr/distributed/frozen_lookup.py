"""Embedding tables that do not move, and neither does their optimizer's state: their lookup runs without gradients.

``requires_grad=False`` would not do it: set before sharding it is ignored, set after it raises; a learning rate of zero
moves the optimizer's state.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable, LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from torchrec_mdr.model import MultiDomainModel, is_lookup

_before = threading.local()  # whether gradients were on before the lookups under way


def freeze_lookups(model: MultiDomainModel) -> None:
    """Freezes the tables named in ``model.frozen``, and no others.

    Sharded collections, which take the places of those of today, are found in the first pass.

    Args:
        model (MultiDomainModel): its collections of tables are not sharded yet.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_start, _after, _freeze_in_place)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    if model.frozen is not None and model.frozen.lookups:
        model.register_forward_pre_hook(_freeze_in_place)
        _freeze_in_place(model, ())  # so that a compiled first pass finds them frozen


def _freeze_in_place(model: nn.Module, args: object) -> None:
    assert isinstance(model, MultiDomainModel) and model.frozen is not None
    for path in model.frozen.lookups:
        lookup = model.backbone.get_submodule(path)
        if _after not in lookup._forward_hooks.values():
            lookup.register_forward_pre_hook(_start)
            lookup.register_forward_hook(_after, always_call=True)


def lookup_paths(backbone: nn.Module) -> tuple[str, ...]:
    """Names of a backbone's collections of embedding tables."""
    return tuple(name for name, module in backbone.named_modules() if is_lookup(module))


def _start(lookup: nn.Module, args: object) -> None:
    stack: list[bool] = getattr(_before, "stack", [])
    _before.stack = [*stack, torch.is_grad_enabled()]
    torch.set_grad_enabled(False)


def _after(lookup: nn.Module, args: object, output: Any) -> Any:
    *_before.stack, enabled = _before.stack
    torch.set_grad_enabled(enabled)
    if isinstance(output, LazyAwaitable):  # what it waits for is put together with gradients on
        output.callbacks.append(_detached)
        return output
    return _detached(output)


def _detached(output: Any) -> Any:
    """The same embeddings, cut off from what they were looked up in."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, KeyedTensor):
        lengths, values = output.length_per_key(), output.values().detach()
        return KeyedTensor(keys=output.keys(), length_per_key=lengths, values=values, key_dim=output.key_dim())
    if isinstance(output, JaggedTensor):
        return JaggedTensor(
            values=output.values().detach(),
            weights=output.weights_or_none(),
            lengths=output.lengths_or_none(),
            offsets=output.offsets_or_none(),
        )
    if isinstance(output, dict):
        return {name: _detached(value) for name, value in output.items()}
    if isinstance(output, tuple | list):  # of managed collections: embeddings and the ids they were looked up by
        return type(output)(_detached(value) for value in output)
    assert output is None or not isinstance(output, Awaitable), f"a lookup gave a {type(output).__name__}"
    return output
