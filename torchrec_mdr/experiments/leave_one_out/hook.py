"""The hook of a stage that shows it its training rows as if frozen embeddings had not been learned from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.experiments.leave_one_out.second_pass import SecondPass
from torchrec_mdr.training.hooks import StageUnderWay

CALIBRATION_ROWS = 65536  # on which the scale is set


class LeaveOneOut(SecondPass):
    """Prepares the second pass at a stage's start, or takes up what an earlier stage behind the same backbone kept."""

    @staticmethod
    def applies(trains_embeddings: bool) -> bool:
        """See :class:`StageHook`: where embeddings are frozen."""
        return not trains_embeddings

    def start(self, under_way: StageUnderWay, shared: dict[Any, Any]) -> None:
        """See :class:`StageHook`: measures the curvature, sets the scale, and keeps what rows see where it fits.

        Raises:
            ValueError: a table whose ids are not in the data.
        """
        stage, config = under_way.stage, under_way.experiment.config
        domains = tuple(config.domains) if stage.per_domain and config.domains is not None else None
        key = LeaveOneOut, domains
        if key in shared:
            self.reuse(shared[key])
            return
        loader = under_way.experiment.train_loader(stage, under_way.environment, config.seed)
        target = under_way.evaluate("validation", Route.BASE).logloss
        assert target is not None, "validation has rows"
        batches = min(loader.num_batches, -(-CALIBRATION_ROWS // config.batch_size))
        tried = loader.batches(0, 0, batches)
        rows, device = loader.num_resident_rows, under_way.environment.device
        self.prepare(under_way.forward_all, lambda: loader.batches(0), tried, rows, target, device)
        seen = self.seen()
        if seen is not None:
            shared[key] = seen
        under_way.say(f"rows left out of the embeddings with scale {self.scale:.4g}")

    def prepare(
        self,
        run: Callable[[Iterator[DomainBatch]], None],
        rows: Callable[[], Iterator[DomainBatch]],
        tried: Iterator[DomainBatch],
        num_resident_rows: int | None,
        target: float,
        device: torch.device,
    ) -> None:
        """Does the three tasks, one after the other.

        Args:
            run (Callable): runs batches through the pipeline.
            rows (Callable): gives all rows to learn from.
            tried (Iterator[DomainBatch]): some of them, to set the scale by.
            num_resident_rows (int | None): rows that this rank's loader keeps in memory.
            target (float): the backbone's log loss on rows it has not learned from.
            device (torch.device): where things are kept.
        """
        measured = rows()
        first = next(measured)
        self.start_measuring(first, device)
        run(chain([first], measured))
        self.finish_measuring()
        self.start_calibration(device)
        run(tried)
        self.finish_calibration(target)
        if self.start_keeping(num_resident_rows, device):
            run(rows())
            self.finish_keeping()
