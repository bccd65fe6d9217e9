"""How many rows a second a stage trains on."""

from __future__ import annotations

import time

from torchrec_mdr.training.stage_checkpoint import StageProgress

WARMUP_STEPS = 5  # of a stage, left out


class Pace:
    """Times a run of steps; what it finds is added to the stage's progress at each look.

    Args:
        progress (StageProgress): of the stage; its step is counted elsewhere, before :meth:`count`.
    """

    def __init__(self, progress: StageProgress) -> None:
        self.progress = progress
        self.rows = 0  # since the last look, after the warm-up
        self.rate = 0.0  # rows a second at the last look
        self._from = time.perf_counter()

    def count(self, rows: int) -> None:
        """Takes note of a step."""
        if self.progress.step > WARMUP_STEPS:
            self.rows += rows
        elif self.progress.step == WARMUP_STEPS:
            self._from = time.perf_counter()

    def look(self) -> None:
        """Takes note of the time; called when the device has done the steps."""
        now = time.perf_counter()
        if self.rows:
            self.progress.seconds += now - self._from
            self.progress.timed_samples += self.rows
            self.rate = self.rows / max(now - self._from, 1e-9)
        self.rows, self._from = 0, now
