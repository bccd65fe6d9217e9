"""All optimizers of a stage as one, keyed by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchrec_mdr.optim.bank_adam import BankAdam
from torchrec_mdr.optim.clipping import DomainClipping


class StageOptimizer(CombinedOptimizer):
    """All optimizers of a stage but the fused one of sharded tables, as one of TorchRec's keyed optimizers.

    Combines with that one, is clipped, scheduled and saved as any keyed optimizer.

    Args:
        optimizers (Mapping[str, torch.optim.Optimizer]): by a name that checkpoints use.
        names (Mapping[nn.Parameter, str]): names of all their parameters.
        clipping (DomainClipping | None): clips the gradients of each domain by itself before a step.
    """

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        names: Mapping[nn.Parameter, str],
        clipping: DomainClipping | None = None,
    ) -> None:
        self.by_name = dict(optimizers)
        self.names = dict(names)
        self.clipping = clipping
        super().__init__([_keyed(optimizer, self.names) for optimizer in self.by_name.values()])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, for good as TorchRec's keyed optimizers do, whatever is asked for."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)

    def step(self, closure: Any = None) -> None:
        """One step of every optimizer."""
        if self.clipping is not None:
            self.clipping.clip()
        super().step(closure)

    def init_state(self, sparse_grad_parameter_names: Set[str] | None = None) -> None:
        """Makes the state, which otherwise the first steps make, so that a checkpoint can be loaded into it.

        No parameter moves and no step is counted.
        """
        for optimizer in self.by_name.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if isinstance(optimizer, BankAdam):
                        optimizer.state_of(parameter)
                    elif not optimizer.state[parameter]:  # Adam's
                        state = optimizer.state[parameter]
                        state["step"] = torch.zeros((), device=parameter.device)
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """The state as one flat dictionary: `OPTIMIZER/PARAMETER/ROLE`."""
        return {
            f"{title}/{name}/{role}": value
            for title, optimizer in self.by_name.items()
            for parameter, name in self.names.items()
            for role, value in optimizer.state.get(parameter, {}).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up the state by the names that :meth:`tensors` gave."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for full_name, value in tensors.items():
            title, rest = full_name.split("/", 1)
            name, role = rest.rsplit("/", 1)
            parameter = parameters[name]
            if value.shape == parameter.shape:  # a moment, which lies in memory as its parameter does
                value = torch.empty_like(parameter).copy_(value)
            self.by_name[title].state[parameter][role] = value


def _keyed(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> KeyedOptimizerWrapper:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return KeyedOptimizerWrapper({names[parameter]: parameter for parameter in parameters}, lambda _: optimizer)
