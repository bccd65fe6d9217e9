"""Fits one stage: train, validate, keep the best, survive interruptions."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.metrics import DomainMetrics, Metrics
from torchrec_mdr.training.combination import CombinationWeights
from torchrec_mdr.training.curves import Curves, draw_validation
from torchrec_mdr.training.early_stopping import BestAboveStart, BestOverall, BestPerDomain
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.judging import judged
from torchrec_mdr.training.looks import Looks
from torchrec_mdr.training.pace import Pace
from torchrec_mdr.training.preemption import Preempted, stop_signals
from torchrec_mdr.training.schedule import Schedule
from torchrec_mdr.training.stage_checkpoint import StageCheckpoints, StageProgress
from torchrec_mdr.training.stage_runtime import StageRuntime

BAR_SECONDS = 0.5  # between two pictures of the progress bar


class StageTrainer:
    """Fits one stage from the tensors its runtime holds.

    Args:
        stage (Stage): what is fitted.
        experiment (Experiment): data and settings.
        runtime (StageRuntime): the stage's model, loaded from the predecessor's checkpoint.
        folder (str): where checkpoints of the stage under way go; removed by :meth:`close`.
        environment (Environment): rank, world size, device.
        shared (dict): what hooks keep from stage to stage behind the same backbone; added to.
        check (Callable): called on the main process before a checkpoint is written.
    """

    def __init__(
        self,
        stage: Stage,
        experiment: Experiment,
        runtime: StageRuntime,
        folder: str,
        environment: Environment,
        shared: dict[Any, Any],
        check: Callable[[], None],
    ) -> None:
        self.stage = stage
        self.experiment = experiment
        self.settings = experiment.settings(stage)
        self.runtime = runtime
        self.writer: Curves | None = None  # TensorBoard's, on the main process
        self.environment = environment
        self.shared = shared
        self.division = experiment.divisions[stage.division]
        self.progress = StageProgress()
        self._started = time.perf_counter()
        config = experiment.config
        self.checkpoints = StageCheckpoints(folder, runtime, environment, config.keep_checkpoints, check)
        self.looks = Looks(environment, config.checkpoint_seconds)
        self._eval_loaders: dict[str, DomainLoader] = {}
        self.improved = False  # whether a validation was better than the start's
        self.train_rows = 0  # of an epoch

    def run(self, saved: tuple[str, StageProgress] | None = None) -> None:
        """Fits the stage; afterwards the runtime holds the best model.

        Args:
            saved (tuple | None): the checkpoint to go on from, and how far the stage had come then.

        Raises:
            ValueError: the loss is not finite.
            Preempted: a signal has asked for the end, and what the stage has come to is saved.
        """
        for hook in self.runtime.hooks:
            hook.start(self, self.shared)
        if saved is not None:
            self.progress = saved[1]
            self._started -= self.progress.stage_seconds
        with stop_signals.saving(), self.environment.getting_on():
            self._run_passes(saved)

    def _run_passes(self, saved: tuple[str, StageProgress] | None) -> None:
        for expert_index in range(self.progress.expert_index, self.stage.expert_passes):
            with self.runtime.model.routed(self.stage.route, self.stage.division, expert_index):
                self._run_pass(expert_index, saved[0] if saved else None)
            saved = None
            self.progress = replace(self.progress, expert_index=expert_index + 1, epoch=0, segment=0, batch=0)

    @property
    def seconds(self) -> float:
        """Spent on the stage so far, in interrupted runs too."""
        return time.perf_counter() - self._started

    def close(self) -> None:
        """Removes the checkpoints of the stage under way."""
        self.checkpoints.close()

    def evaluate(self, split: str, route: Route, division: int = 0, expert_index: int = 0) -> Metrics:
        """Metrics of a split's rows by the domains of a division, on all ranks."""
        return self.collect(split, route, division, expert_index).compute()

    def collect(
        self,
        split: str,
        route: Route,
        division: int = 0,
        expert_index: int = 0,
        combination: CombinationWeights | None = None,
    ) -> DomainMetrics:
        """The rows of :meth:`evaluate`, this rank's, in the same order at every call; collects what layers combine."""
        if split not in self._eval_loaders:
            self._eval_loaders[split] = self.experiment.eval_loader(split, self.environment)
        metrics = self.experiment.new_metrics(division).to(self.environment.device)
        with self.runtime.model.routed(route, division, expert_index):
            for output in self.runtime.evaluate(self._eval_loaders[split].batches(0)):
                self.environment.at(f"evaluating on {split} rows in stage '{self.stage.name}'")
                metrics.update(output.logits, output.labels, output.domain_ids[:, division], output.weights)
                if combination is not None:
                    combination.update(output.domain_ids[:, division])
        return metrics

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
        self.train_rows = loader.num_rows
        schedule = Schedule.of(self.settings, loader.num_batches, loader.num_rows)
        selection = self._selection(expert_index, schedule.patience)
        average_steps = self.settings.ema_rows * loader.num_batches / max(loader.num_rows, 1)
        self.checkpoints.start_average(self.settings.ema_decay, average_steps)
        if saved is not None:
            self.checkpoints.restore(saved, self.progress, selection)
            self._freeze(selection, expert_index)
        elif self.stage.starts_from_result:
            self._validate(selection, expert_index)
            self._save(selection)
        bounds, parts = schedule.bounds, schedule.parts
        trains = self.runtime.stage_optimizer.by_name or self.runtime.fused_optimizer is not None
        epochs = self.settings.epochs if trains else 0
        for epoch in range(self.progress.epoch, epochs):
            for segment in range(self.progress.segment, parts):
                if selection.done:
                    break
                self.progress.epochs_run += segment == 0 and self.progress.batch == 0
                self._seed(epoch, segment, expert_index)
                if self.progress.batch and saved is not None:
                    self.checkpoints.restore_random_states(saved)
                first, last = bounds[segment] + self.progress.batch, bounds[segment + 1]
                self._train(loader.batches(epoch, first, last), last - first, selection)
                at_end = segment + 1 == parts
                self.progress.epoch, self.progress.segment = epoch + at_end, 0 if at_end else segment + 1
                self.progress.batch = 0
                if schedule.validates(epoch, epochs):
                    self._validate(selection, expert_index)
                    self._save(selection)
        self.improved |= selection.improved
        if isinstance(selection, BestPerDomain):
            selection.put_back()
            self.checkpoints.put_back_banks(self.progress, selection.best_step)
        elif selection.best is not None:
            self.checkpoints.load_best(self.progress)

    def _selection(self, expert_index: int, patience: int) -> BestOverall | BestPerDomain:
        tolerance = self.settings.logloss_tolerance
        if not self.stage.per_domain:
            return (BestAboveStart if self.stage.begins_elsewhere else BestOverall)(patience, tolerance)
        size = self.division.num_domains
        wanted = self.experiment.config.domains
        domains = torch.ones(size, dtype=torch.bool)
        if wanted is not None:
            domains = torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(wanted), True)
        owned = self.runtime.prepared.owned_rows(size, expert_index)
        return BestPerDomain(owned, domains, patience, tolerance, self.progress.step)

    def _seed(self, epoch: int, segment: int, expert_index: int) -> None:
        """Seeds here and not once, so that a resumed run draws the same dropout."""
        seed, rank = self.experiment.config.seed, self.environment.rank
        torch.manual_seed(zlib.crc32(f"{seed}/{self.stage.name}/{expert_index}/{epoch}/{segment}/{rank}".encode()))

    def _train(self, batches: Any, steps: int, selection: BestOverall | BestPerDomain) -> None:
        sizes: list[int] = []

        def counted() -> Any:
            for batch in batches:
                sizes.append(batch.global_rows)
                yield batch

        losses: list[Tensor] = []
        pace = Pace(self.progress)
        title = f"{self.stage.name} epoch {self.progress.epoch + 1}/{self.settings.epochs}"
        with tqdm(
            total=self.progress.batch + steps,
            initial=self.progress.batch,
            desc=title,
            unit="batch",
            disable=not self.environment.is_main,
            leave=False,
            mininterval=BAR_SECONDS,
        ) as bar:
            for done, output in enumerate(self.runtime.train(counted()), 1):
                losses.append(output.loss)
                self.progress.step += 1
                self.progress.batch += 1
                self.environment.at(f"at step {self.progress.step} of stage '{self.stage.name}'")
                if self.checkpoints.average is not None:
                    self.checkpoints.average.update()
                bar.update()
                pace.count(sizes[done - 1])
                if done < steps and not self.looks.due(len(losses)):
                    continue
                look = self.looks.look(losses)
                self._log_losses(look.losses)
                losses = []
                pace.look()
                if pace.rate:
                    bar.set_postfix_str(f"{pace.rate:,.0f} samples/s")
                if look.stops or (look.saves and done < steps):  # a validation saves at the end
                    self._save(selection)
                    pace.look()  # copying is no training
                if look.stops:
                    self._stop()

    def _stop(self) -> NoReturn:
        self.checkpoints.wait()
        raise Preempted(
            f"stopped by {stop_signals.received or 'a signal'} after step {self.progress.step} of stage "
            f"'{self.stage.name}', which is saved"
        )

    def _log_losses(self, values: list[float]) -> None:
        first = self.progress.step - len(values) + 1
        bad = [first + i for i, value in enumerate(values) if not np.isfinite(value)]
        if bad:
            self.checkpoints.wait()
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
            if isinstance(selection, BestPerDomain):
                selection.step = self.progress.step
            better = selection.update(*judged(result, self.settings.monitor, self.settings.pooled_below))
        if better:
            self.progress.best_step = self.progress.step
        self._freeze(selection, expert_index)
        if self.writer is not None:
            name, step = self.stage.name, self.progress.step
            draw_validation(self.writer, name, result, step)
            self.writer.flush()
            tqdm.write(
                f"{name} step {step}: validation AUC {result.auc or float('nan'):.4f}, log loss {result.logloss:.4f}"
            )

    def _save(self, selection: BestOverall | BestPerDomain) -> None:
        self.progress.stage_seconds = self.seconds
        if self.writer is not None:  # what comes after the checkpoint is drawn anew by a run that goes on from it
            self.writer.flush()
        self.checkpoints.save(self.progress, selection)
        self.looks.saved()

    def _freeze(self, selection: BestOverall | BestPerDomain, expert_index: int) -> None:
        if isinstance(selection, BestPerDomain):
            self.runtime.prepared.freeze_domains(selection.frozen, expert_index)


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
