"""Signals by which a scheduler announces that it takes the machine away: SIGTERM, and SIGUSR1 as Slurm may be told."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run has stopped because it was told to; the same command goes on."""


class StopSignals:
    """Takes note of the signals, so that a stage can save what it has come to before the process ends."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._saves = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles them for a while, in the main thread: elsewhere than in :meth:`saving` they raise Preempted."""
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            self.received = None
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While this is open a signal is only noted: what runs inside looks at :attr:`received`, and saves."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if not self._saves:
            raise Preempted(f"stopped by {self.received}")


stop_signals = StopSignals()  # of this process
