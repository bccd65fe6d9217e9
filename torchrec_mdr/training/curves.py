"""A stage's curves for TensorBoard, which a run does not depend on."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack

from torch.utils.tensorboard import SummaryWriter

from torchrec_mdr.metrics import Metrics
from torchrec_mdr.storage import is_store, ls, put_file, scratch_folder, size

MOST_CURVES = 50  # domains that have their own

logger = logging.getLogger(__name__)


class Curves:
    """Draws values over steps; where they cannot be written, says so once and draws no more.

    TensorBoard's writer appends to a file, which a store does not let one do: there the file grows on the local disk,
    and :meth:`flush` puts all of it into the store.

    Args:
        folder (str): holds the events of this stage alone, since TensorBoard purges a whole folder by steps.
        purge_step (int | None): what was drawn from this step on does not count; None keeps all.
    """

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._scratch: str | None = None
        self._at_end = ExitStack()
        self._put: dict[str, int] = {}  # bytes of the files that are in the store
        try:
            if is_store(folder):
                self._scratch = self._at_end.enter_context(scratch_folder())
            self._writer = SummaryWriter(self._scratch or folder, purge_step=purge_step)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Draws one value."""
        try:
            if self._writer is not None:
                self._writer.add_scalar(tag, value, step)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Writes what is drawn so far."""
        try:
            if self._writer is not None:
                self._writer.flush()
                self._put_files()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def close(self) -> None:
        """Writes the rest."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._at_end.close()

    def _put_files(self) -> None:
        """Puts the files that have grown into the store."""
        if self._scratch is None:
            return
        for name in ls(self._scratch):
            local = os.path.join(self._scratch, name)
            if size(local) != self._put.get(name):
                put_file(local, os.path.join(self.folder, name))
                self._put[name] = size(local)

    def _give_up(self, error: OSError | ValueError) -> None:
        self._writer = None
        reason = getattr(error, "strerror", None) or error
        logger.warning("no more curves are drawn: %s cannot be written (%s)", self.folder, reason)


def draw_validation(curves: Curves, stage: str, result: Metrics, step: int) -> None:
    """Draws what a validation found, of all rows and, where there are few domains, of each."""
    totals: dict[str, float | None] = {"auc": result.auc, "wauc": result.wauc, "logloss": result.logloss}
    totals |= {"ne": result.ne, "calibration": result.calibration, **result.others}
    values = {f"{stage}/validation_{title}": value for title, value in totals.items()}
    if len(result.domains) <= MOST_CURVES:
        for domain, part in result.domains.items():
            own = {"auc": part.auc, "ne": part.ne, "calibration": part.calibration}
            values |= {f"{stage}/validation_{title}/{domain}": value for title, value in own.items()}
    for title, value in values.items():
        if value is not None:
            curves.add_scalar(title, value, step)
