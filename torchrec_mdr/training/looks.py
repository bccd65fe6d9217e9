"""Looks at a stage's steps, about one a second: at the losses, and at whether to save or to stop."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.training.preemption import stop_signals

LOOK_SECONDS = 1.0
FIRST_LOOK, MOST_STEPS = 5, 50  # steps between two looks: before their pace is known, and at most


class Look(NamedTuple):
    """What all ranks see at a look.

    Args:
        losses (list[float]): of each step since the last look, over all ranks.
        stops (bool): whether a rank has been told to stop.
        saves (bool): whether a checkpoint is due.
    """

    losses: list[float]
    stops: bool
    saves: bool


class Looks:
    """Decides when to look. A look waits for the device and for the other ranks, so that all decide the same.

    Args:
        environment (Environment): rank, world size, device.
        save_seconds (float): most seconds between two checkpoints; 0 asks for none.
    """

    def __init__(self, environment: Environment, save_seconds: float) -> None:
        self.environment = environment
        self.save_seconds = save_seconds
        self._every = FIRST_LOOK
        self._last = self._saved = time.perf_counter()

    def due(self, steps: int) -> bool:
        """Whether to look, so many steps after the last look."""
        return steps >= self._every or (self.environment.world_size == 1 and stop_signals.received is not None)

    def saved(self) -> None:
        """Takes note of a checkpoint."""
        self._saved = time.perf_counter()

    def look(self, losses: list[Tensor]) -> Look:
        """Looks at the losses of the steps since the last look, [] each; called by all ranks."""
        now = time.perf_counter()
        pace = (now - self._last) / max(len(losses), 1)
        every = min(max(int(LOOK_SECONDS / max(pace, 1e-9)), 1), MOST_STEPS)
        saves = 0 < self.save_seconds <= now - self._saved
        self._last = now
        main = self.environment.is_main  # whose clock counts
        signs = [float(stop_signals.received is not None), float(main and saves), float(every if main else 0)]
        seen = torch.cat([torch.stack(losses), torch.tensor(signs, device=self.environment.device)])
        if self.environment.world_size > 1:
            dist.all_reduce(seen)
        *totals, stops, save, steps = seen.tolist()
        self._every = int(steps)
        return Look([total / self.environment.world_size for total in totals], stops > 0, save > 0)
