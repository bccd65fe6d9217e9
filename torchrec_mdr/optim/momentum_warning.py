"""Says so, once, where an optimizer moves adapters of domains that a step has no rows of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_mdr.optim.bank_adam import BankAdam

_in_banks: Any = WeakIdKeyDictionary()  # parameters of banks that train
_seen: Any = WeakIdKeyDictionary()  # optimizers that were looked at
_handle: RemovableHandle | None = None


def watch(parameters: Iterable[nn.Parameter]) -> None:
    """Warns in the first step of an optimizer, other than BankAdam, that moves these parameters without gradients."""
    global _handle
    for parameter in parameters:
        _in_banks[parameter] = True
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_look)


def _look(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    if optimizer in _seen or isinstance(optimizer, BankAdam | KeyedOptimizer):
        return  # a keyed optimizer is around another one, which is looked at
    _seen[optimizer] = True
    for group in optimizer.param_groups:
        moves = [option for option in ("betas", "momentum", "weight_decay") if group.get(option)]
        if moves and any(parameter in _in_banks for parameter in group["params"]):
            warnings.warn(
                f"{type(optimizer).__name__} trains adapters with {moves[0]}, so it moves adapters of domains that a "
                "step has no rows of, and what a domain learns depends on the others; take stage.optimizer(...), "
                "with which domains are isolated",
                stacklevel=3,
            )
            return
