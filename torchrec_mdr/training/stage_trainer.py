"""Fits one stage: train, validate, keep the best, survive interruptions."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.metrics import Metrics
from torchrec_mdr.training.combination import CombinationWeights
from torchrec_mdr.training.early_stopping import BestOverall, BestPerDomain
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.stage_checkpoint import StageCheckpoints, StageProgress
from torchrec_mdr.training.stage_runtime import StageRuntime

BAR_SECONDS = 0.5  # between two pictures of the progress bar
WARMUP_STEPS = 5  # left out of samples per second
LOSS_CHECK_STEPS = 50  # between looks at the loss, each of which waits for the device


class StageTrainer:
    """Fits one stage from the tensors its runtime holds.

    Args:
        stage (Stage): what is fitted.
        experiment (Experiment): data and settings.
        runtime (StageRuntime): the stage's model, loaded from the predecessor's checkpoint.
        folder (str): where checkpoints of the stage under way go; removed by :meth:`close`.
        writer (SummaryWriter | None): TensorBoard's, on the main process.
        environment (Environment): rank, world size, device.
        shared (dict): what hooks keep from stage to stage behind the same backbone; added to.
    """

    def __init__(
        self,
        stage: Stage,
        experiment: Experiment,
        runtime: StageRuntime,
        folder: str,
        writer: SummaryWriter | None,
        environment: Environment,
        shared: dict[Any, Any],
    ) -> None:
        self.stage = stage
        self.experiment = experiment
        self.settings = experiment.settings(stage)
        self.runtime = runtime
        self.writer = writer
        self.environment = environment
        self.shared = shared
        self.division = experiment.divisions[stage.division]
        self.progress = StageProgress()
        self._started = time.perf_counter()
        self.checkpoints = StageCheckpoints(folder, runtime, environment)
        self._eval_loaders: dict[str, DomainLoader] = {}

    def run(self, resume: bool) -> None:
        """Fits the stage; afterwards the runtime holds the best model.

        Raises:
            ValueError: the loss is not finite.
        """
        for hook in self.runtime.hooks:
            hook.start(self, self.shared)
        saved = self.checkpoints.newest() if resume else None
        if saved is not None:
            self.progress = saved[1]
            self._started -= self.progress.stage_seconds
        for expert_index in range(self.progress.expert_index, self.stage.expert_passes):
            with self.runtime.model.routed(self.stage.route, self.stage.division, expert_index):
                self._run_pass(expert_index, saved[0] if saved else None)
            saved = None
            self.progress = replace(self.progress, expert_index=expert_index + 1, epoch=0, segment=0)

    @property
    def seconds(self) -> float:
        """Spent on the stage so far, in interrupted runs too."""
        return time.perf_counter() - self._started

    def close(self) -> None:
        """Removes the checkpoints of the stage under way."""
        self.checkpoints.close()

    def evaluate(
        self,
        split: str,
        route: Route,
        division: int = 0,
        expert_index: int = 0,
        combination: CombinationWeights | None = None,
    ) -> Metrics:
        """Metrics of a split's rows by the domains of a division, on all ranks; collects what layers combine."""
        if split not in self._eval_loaders:
            self._eval_loaders[split] = self.experiment.eval_loader(split, self.environment)
        metrics = self.experiment.new_metrics(division).to(self.environment.device)
        with self.runtime.model.routed(route, division, expert_index):
            for output in self.runtime.evaluate(self._eval_loaders[split].batches(0)):
                metrics.update(output.logits, output.labels, output.domain_ids[:, division])
                if combination is not None:
                    combination.update(output.domain_ids[:, division])
        return metrics.compute()

    def forward_all(self, batches: Iterator[DomainBatch]) -> None:
        """Runs batches for what hooks make of them, in evaluation mode but with gradients."""
        self.runtime.forward_all(batches)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, on the main process."""
        if self.environment.is_main:
            tqdm.write(f"{self.stage.name}: {text}")

    def _run_pass(self, expert_index: int, saved: str | None) -> None:
        loader = self.experiment.train_loader(
            self.stage, self.environment, self.experiment.config.seed + 1000 * expert_index
        )
        selection = self._selection(expert_index)
        self.checkpoints.start_average(self.settings.ema_decay)
        if saved is not None:
            self.checkpoints.restore(saved, self.progress, selection)
            self._freeze(selection, expert_index)
        elif self.stage.starts_from_result:
            self._validate(selection, expert_index)
            self._save(selection)
        parts = self.settings.validations_per_epoch
        bounds = [round(loader.num_batches * part / parts) for part in range(parts + 1)]
        for epoch in range(self.progress.epoch, self.settings.epochs if self.runtime.optimizer.optimizers else 0):
            for segment in range(self.progress.segment, parts):
                if selection.done:
                    break
                self.progress.epochs_run += segment == 0
                self._train(
                    loader.batches(epoch, bounds[segment], bounds[segment + 1]), epoch, segment, expert_index, bounds
                )
                self._validate(selection, expert_index)
                at_end = segment + 1 == parts
                self.progress.epoch, self.progress.segment = epoch + at_end, 0 if at_end else segment + 1
                self._save(selection)
        if isinstance(selection, BestPerDomain):
            selection.put_back()
        elif selection.best is not None:
            self.checkpoints.load_best(self.progress)

    def _selection(self, expert_index: int) -> BestOverall | BestPerDomain:
        if not self.stage.per_domain:
            return BestOverall(self.settings.patience)
        size = self.division.num_domains
        wanted = self.experiment.config.domains
        domains = torch.ones(size, dtype=torch.bool)
        if wanted is not None:
            domains = torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(wanted), True)
        return BestPerDomain(self.runtime.owned_rows(size, expert_index), domains, self.settings.patience)

    def _train(self, batches: Any, epoch: int, segment: int, expert_index: int, bounds: list[int]) -> None:
        # seeded here and not once, so that a resumed run draws the same dropout
        key = (
            f"{self.experiment.config.seed}/{self.stage.name}/{expert_index}/{epoch}/{segment}/{self.environment.rank}"
        )
        torch.manual_seed(zlib.crc32(key.encode()))
        sizes: list[int] = []

        def counted() -> Any:
            for batch in batches:
                sizes.append(batch.global_rows)
                yield batch

        losses: list[Tensor] = []
        started, timed_from = time.perf_counter(), 0
        steps = bounds[segment + 1] - bounds[segment]
        title = f"{self.stage.name} epoch {epoch + 1}/{self.settings.epochs}"
        with tqdm(
            total=steps,
            desc=title,
            unit="batch",
            disable=not self.environment.is_main,
            leave=False,
            mininterval=BAR_SECONDS,
        ) as bar:
            for done, output in enumerate(self.runtime.train(counted()), 1):
                losses.append(output.loss)
                self.progress.step += 1
                if self.checkpoints.average is not None:
                    self.checkpoints.average.update()
                bar.update()
                if self.progress.step == WARMUP_STEPS:
                    started, timed_from = time.perf_counter(), done
                if done % LOSS_CHECK_STEPS == 0 or done == steps:
                    self._log_losses(losses)
                    losses = []
                    if self.progress.step > WARMUP_STEPS:
                        elapsed = time.perf_counter() - started
                        bar.set_postfix_str(f"{sum(sizes[timed_from:done]) / elapsed:,.0f} samples/s")
        if self.progress.step > WARMUP_STEPS:
            self.progress.seconds += time.perf_counter() - started
            self.progress.timed_samples += sum(sizes[timed_from:])

    def _log_losses(self, losses: list[Tensor]) -> None:
        total = torch.stack(losses)
        if self.environment.world_size > 1:
            dist.all_reduce(total)
            total /= self.environment.world_size
        values = total.tolist()
        first = self.progress.step - len(values) + 1
        bad = [first + i for i, value in enumerate(values) if not np.isfinite(value)]
        if bad:
            last = self.checkpoints.last_saved
            saved = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise ValueError(
                f"the loss is not finite at step {bad[0]} of stage '{self.stage.name}'; {saved}; lower learning_rate"
            )
        if self.writer is not None:
            self.writer.add_scalar(f"{self.stage.name}/loss", float(np.mean(values)), self.progress.step)

    def _validate(self, selection: BestOverall | BestPerDomain, expert_index: int) -> None:
        with self.checkpoints.averaged():
            result = self.evaluate("validation", self.stage.route, self.stage.division, expert_index)
            monitored = result.auc if self.settings.monitor == "auc" else result.mean_auc
            better = selection.update(monitored or 0.0, torch.from_numpy(result.auc_per_domain))
        if better:
            self.progress.best_step = self.progress.step
        self._freeze(selection, expert_index)
        if self.writer is not None:
            name, step = self.stage.name, self.progress.step
            totals = {"auc": result.auc, "wauc": result.wauc, "logloss": result.logloss, **result.others}
            for title, value in totals.items():
                if value is not None:
                    self.writer.add_scalar(f"{name}/validation_{title}", value, step)
            if len(result.domains) <= 50:
                for domain, part in result.domains.items():
                    if part.auc is not None:
                        self.writer.add_scalar(f"{name}/validation_auc/{domain}", part.auc, step)
            self.writer.flush()
            tqdm.write(
                f"{name} step {step}: validation AUC {result.auc or float('nan'):.4f}, log loss {result.logloss:.4f}"
            )

    def _save(self, selection: BestOverall | BestPerDomain) -> None:
        self.progress.stage_seconds = self.seconds
        self.checkpoints.save(self.progress, selection)

    def _freeze(self, selection: BestOverall | BestPerDomain, expert_index: int) -> None:
        if isinstance(selection, BestPerDomain):
            self.runtime.freeze_rows(selection.frozen, expert_index)


def domain_weights(counts: Tensor) -> Tensor:
    """Weights of a row's loss by its domain: the inverse of the domain's share of the rows, 1 where it has none.

    Args:
        counts (Tensor): int64 [N], rows of each domain.

    Returns:
        Tensor: float32 [N].

    Example::

        >>> domain_weights(torch.tensor([30, 10, 0])).tolist()
        [1.3333333730697632, 4.0, 1.0]
    """
    share = counts.double() / max(int(counts.sum()), 1)
    return torch.where(counts > 0, 1.0 / share.clamp(min=1e-12), 1.0).float()
