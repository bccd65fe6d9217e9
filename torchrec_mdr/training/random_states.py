"""The states of all ranks' random generators, so that dropout goes on as it would have."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_mdr.distributed.environment import Environment


def random_states(environment: Environment) -> dict[str, Tensor]:
    """The generators' states by device, uint8 [ranks, size]; called by all ranks."""
    own = {"cpu": torch.get_rng_state()}
    if environment.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(environment.device)
    found: list[Any] = [own]
    if environment.world_size > 1:
        found = [None] * environment.world_size
        dist.all_gather_object(found, own)
    return {name: torch.stack([one[name] for one in found]) for name in own}


def take_up_random_states(states: dict[str, Tensor], environment: Environment) -> None:
    """Sets this rank's generators, where the states are of as many ranks and the same devices; else leaves them."""
    wanted = {"cpu", environment.device.type}
    if set(states) != wanted or any(len(one) != environment.world_size for one in states.values()):
        return  # another world: its masks cannot be the same ones
    own = {name: one[environment.rank].clone() for name, one in states.items()}  # torch reads a view past its end
    torch.set_rng_state(own["cpu"])
    if "cuda" in wanted:
        torch.cuda.set_rng_state(own["cuda"], environment.device)
