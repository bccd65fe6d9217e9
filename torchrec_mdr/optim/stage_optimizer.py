"""All optimizers of a stage as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer


class StageOptimizer:
    """All optimizers of a stage behind the two calls that a train pipeline makes.

    Args:
        optimizers (dict[str, torch.optim.Optimizer]): by a name that checkpoints use.
        names (dict[Tensor, str]): names of the parameters of the optimizers that are not fused.
        fused (KeyedOptimizer | None): the embedding tables' optimizer, where their kernels update them.
    """

    def __init__(
        self, optimizers: dict[str, torch.optim.Optimizer], names: dict[Tensor, str], fused: KeyedOptimizer | None
    ) -> None:
        self.optimizers = optimizers
        self.names = names
        self.fused = fused

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of every optimizer."""
        for optimizer in self.optimizers.values():
            optimizer.step()

    def tensors(self) -> dict[str, Any]:
        """The state, by name: `OPTIMIZER/PARAMETER/ROLE`, sharded like the tables in the fused optimizer."""
        tensors = {
            f"{group}/{self.names[parameter]}/{role}": value
            for group, optimizer in self.optimizers.items()
            for parameter, state in optimizer.state.items()
            for role, value in state.items()
        }
        for name, value in self.fused_tensors().items():
            tensors[name] = value
        return tensors

    def fused_tensors(self) -> dict[str, Any]:
        """The state of the fused optimizer; loading into these tensors sets it."""
        if self.fused is None:
            return {}
        state = self.fused.state_dict()["state"]
        return {f"fused/{name}/{role}": value for name, roles in state.items() for role, value in roles.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up the state of the optimizers that are not fused, by the names that :meth:`tensors` gave."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for full_name, value in tensors.items():
            optimizer, rest = full_name.split("/", 1)
            name, role = rest.rsplit("/", 1)
            parameter = parameters[name]
            if value.shape == parameter.shape:  # a moment, which lies in memory as its parameter does
                value = torch.empty_like(parameter).copy_(value)
            self.optimizers[optimizer].state[parameter][role] = value
