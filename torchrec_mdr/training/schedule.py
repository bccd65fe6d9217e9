"""When a stage validates, and how many validations it waits for a better one."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from torchrec_mdr.training.config import StageConfig


@dataclass(frozen=True)
class Schedule:
    """A stage's validations.

    Args:
        bounds (tuple[int, ...]): of an epoch's segments, in batches, from 0 to the number of batches.
        epochs_between (int): epochs between two validations; 1 where a segment ends with one.
        patience (int): validations without a better result before the stage (or a domain) stops.

    Example::

        >>> Schedule.of(StageConfig(validation_rows=10_000, patience_rows=25_000), num_batches=8, num_rows=4_000)
        Schedule(bounds=(0, 8), epochs_between=2, patience=4)
        >>> Schedule.of(StageConfig(validation_rows=10_000, patience_rows=25_000), num_batches=8, num_rows=20_000)
        Schedule(bounds=(0, 4, 8), epochs_between=1, patience=3)
    """

    bounds: tuple[int, ...]
    epochs_between: int
    patience: int

    @staticmethod
    def of(settings: StageConfig, num_batches: int, num_rows: int) -> Schedule:
        """The schedule of a stage that learns from so many batches and rows an epoch, over all ranks."""
        parts, between, patience = settings.validations_per_epoch, 1, settings.patience
        if settings.validation_rows:
            parts = min(max(round(num_rows / settings.validation_rows), 1), max(num_batches, 1))
            between = max(round(settings.validation_rows / max(num_rows, 1)), 1)
        if settings.patience_rows:
            patience = max(ceil(settings.patience_rows * parts / (max(num_rows, 1) * between)), 1)
        bounds = tuple(round(num_batches * part / parts) for part in range(parts + 1))
        return Schedule(bounds, between, patience)

    @property
    def parts(self) -> int:
        """Segments of an epoch."""
        return len(self.bounds) - 1

    def validates(self, epoch: int, epochs: int) -> bool:
        """Whether validations follow the segments of an epoch, counted from 0, of so many epochs."""
        return (epoch + 1) % self.epochs_between == 0 or epoch + 1 == epochs
