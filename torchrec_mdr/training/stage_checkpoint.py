"""Checkpoints of a stage under way, from which an interrupted run goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.checkpoint_store import remove_checkpoint
from torchrec_mdr.distributed.checkpoint_writer import WRITING
from torchrec_mdr.distributed.environment import Environment, on_main
from torchrec_mdr.distributed.stored_rows import StoredTensor
from torchrec_mdr.optim.averaging import WeightAverage
from torchrec_mdr.storage import StoreFails, is_whole, ls
from torchrec_mdr.training.early_stopping import BestPerDomain, EarlyStopping
from torchrec_mdr.training.random_states import random_states, take_up_random_states
from torchrec_mdr.training.stage_runtime import StageRuntime

BLOCK = 1 << 14  # rows of a bank that are read at once

logger = logging.getLogger(__name__)
# the group that is open, and the one beside it that saves in the background talk over
_groups: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


@dataclass
class StageProgress:
    """How far a stage has come, in work that is finished and saved.

    Args:
        expert_index: the pass under way.
        epoch: epochs of that pass that are complete.
        segment: validations since then.
        batch: batches since the last of them.
        step: training steps of the stage.
        best_step: the step whose weights are the best so far.
        epochs_run: epochs that were begun, over all passes.
        seconds: of training alone, after the warm-up.
        timed_samples: rows trained on in these seconds, over all ranks.
        stage_seconds: of all that has been done for the stage, in interrupted runs too.
    """

    expert_index: int = 0
    epoch: int = 0
    segment: int = 0
    batch: int = 0
    step: int = 0
    best_step: int = 0
    epochs_run: int = 0
    seconds: float = 0.0
    timed_samples: int = 0
    stage_seconds: float = 0.0

    @property
    def samples_per_second(self) -> float | None:
        """Of training alone, over all ranks; None before the warm-up is over."""
        return round(self.timed_samples / self.seconds, 1) if self.seconds else None


class StageCheckpoints:
    """Saves and restores what a stage has come to: the tensors that train, their optimizers' and the selection's state.

    They are written in the background; one that is under way is waited for before the next.

    Args:
        folder (str): holds them; those that are no longer needed are removed.
        runtime (StageRuntime): the stage's model and optimizers.
        environment (Environment): rank, world size, device.
        keep (int): how many of the newest stay, beside the best.
        check (Callable): called on the main process before anything is written, see :func:`checkpoint.save`.
    """

    def __init__(
        self,
        folder: str,
        runtime: StageRuntime,
        environment: Environment,
        keep: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.runtime = runtime
        self.environment = environment
        self.keep = keep
        self.check = check
        self.average: WeightAverage | None = None
        self.last_saved: str | None = None
        self._saving: tuple[Future[None], str, set[str]] | None = None  # what is under way, where, and the best then

    def close(self) -> None:
        """Removes all of them."""
        self.wait()
        if self.environment.is_main:
            remove_progress(self.folder)

    def start_average(self, decay: float, steps: float = 0.0) -> None:
        """Averages the weights from now on, over so many steps where they are given; 0 and 0 do not."""
        tensors = self._model_state().values()
        if steps:
            self.average = WeightAverage.over(tensors, steps)
        else:
            self.average = WeightAverage(tensors, decay) if decay else None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights in place for a while, where the stage averages."""
        if self.average is not None:
            self.average.swap()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()

    def save(self, progress: StageProgress, selection: EarlyStopping) -> None:
        """Begins to write a checkpoint; called by all ranks.

        Raises:
            ValueError: it, or the one before, cannot be written.
        """
        self.wait()
        state = self._model_state()
        state |= {f"optimizer/{name}": tensor for name, tensor in self.runtime.optimizer_tensors().items()}
        state |= {f"selection/{name}": tensor for name, tensor in selection.tensors().items()}
        info: dict[str, Any] = {"progress": asdict(progress), "selection": selection.info()}
        if progress.batch:
            state |= {f"random/{name}": tensor for name, tensor in random_states(self.environment).items()}
        if self.average is not None:
            info["averaged_steps"] = self.average.step
            with self.averaged():
                copies = {name: tensor.clone() for name, tensor in checkpoint.detached(self._model_state()).items()}
            state |= {f"averaged/{name}": tensor for name, tensor in copies.items()}
        path = self._path(progress, progress.step)
        saving: Future[None] = Future()
        needed = {self._path(progress, progress.best_step)}
        has_tables = self.runtime.model.bank_tables is not None  # without a copy they take what `plan` states
        if has_tables and isinstance(selection, BestPerDomain):
            needed |= {self._path(progress, step) for step in selection.best_step.unique().tolist()}
        if not has_tables and on_main(lambda: checkpoint.fits_again(state, self.environment), self.environment):
            saving = checkpoint.save_async(path, state, info, self._group(), self.check)
        else:  # the background would want a copy
            checkpoint.save(path, state, info, self.check)
            saving.set_result(None)
        self._saving = saving, path, needed

    def wait(self) -> None:
        """Waits until what is under way is written; called by all ranks.

        Raises:
            ValueError: it cannot be written.
        """
        if self._saving is None:
            return
        (saving, path, needed), self._saving = self._saving, None
        saving.result()
        self.last_saved = path
        if self.environment.is_main:
            self._remove_others({path, *needed})

    def _remove_others(self, needed: set[str]) -> None:
        """Removes all checkpoints but those that are needed, and the newest."""
        try:
            kept = {*whole_checkpoints(self.folder)[-self.keep :], *needed}
            _remove([os.path.join(self.folder, name) for name in ls(self.folder)], kept)
        except ValueError as error:
            logger.warning("%s; old checkpoints stay there", error)

    def newest(self) -> tuple[str, StageProgress] | None:
        """The last checkpoint that is whole and sound, and how far the stage had come; None where there is none.

        Called by all ranks.

        Raises:
            ValueError: all of them are damaged.
            StoreFails: their store does: going on from an older one would lose work that may be sound.
        """
        paths = on_main(lambda: whole_checkpoints(self.folder), self.environment)
        for older, path in reversed([*zip([None, *paths], paths, strict=False)]):
            try:
                checkpoint.check_files(path)
                info = on_main(partial(checkpoint.read_info, path, "progress"), self.environment)
                return path, StageProgress(**info["progress"])
            except StoreFails:
                raise
            except ValueError as error:
                if older is None:
                    raise
                if self.environment.is_main:
                    logger.warning("%s; going on from the one before, %s", error, older)
        return None

    def restore(self, path: str, progress: StageProgress, selection: EarlyStopping) -> None:
        """Takes up the state of a checkpoint; called by all ranks."""
        info = on_main(lambda: checkpoint.read_info(path, "progress", "selection"), self.environment)
        if self.average is not None:
            self.average.step = info.get("averaged_steps", progress.step)
            if self.average.has_looked:  # before, it has kept the stage's start
                checkpoint.load(path, {f"averaged/{name}": tensor for name, tensor in self._model_state().items()})
                self.average.restart(self.average.step)
        fused = {f"optimizer/{name}": tensor for name, tensor in self.runtime.fused_tensors().items()}
        checkpoint.load(path, self._model_state() | fused)
        device = self.environment.device
        self.runtime.stage_optimizer.restore(checkpoint.load_new(path, "optimizer/", device, "optimizer/fused/"))
        if self.runtime.fused_optimizer is not None:
            self.runtime.fused_optimizer.set_optimizer_step(progress.step)
        selection.restore(info["selection"], checkpoint.load_new(path, "selection/", self.environment.device))
        self.last_saved = path

    def restore_random_states(self, path: str) -> None:
        """Takes up the generators' states of a checkpoint between two validations."""
        stored = checkpoint.load_new(path, "random/", self.environment.device)
        take_up_random_states({name: tensor.cpu() for name, tensor in stored.items()}, self.environment)

    def load_best(self, progress: StageProgress) -> None:
        """Puts the best weights so far into the model; called by all ranks."""
        self.wait()
        prefix = "" if self.average is None else "averaged/"
        path = self._path(progress, progress.best_step)
        checkpoint.load(path, {f"{prefix}{name}": tensor for name, tensor in self._model_state().items()})

    @torch.no_grad()
    def put_back_banks(self, progress: StageProgress, best_step: Tensor) -> None:
        """Puts the rows of sharded banks in place that each domain, int64 [N], had at its best step.

        They come from the checkpoints of these steps, of which no copy is made in memory; called by all ranks.
        """
        tables = self.runtime.model.bank_tables
        if tables is None:
            return
        self.wait()
        stage, prefix = self.runtime.stage, "" if self.average is None else "averaged/"
        rows = tables.local_rows(stage.route, stage.division)
        for step in best_step.unique().tolist():
            folder = self._path(progress, step)
            checkpoint.check_files(folder)
            own = best_step == step
            for name, pieces in rows.items():
                stored = StoredTensor(folder, f"{prefix}model/bank_tables.{name}")
                for first, target in pieces:
                    wanted = tables.rows_of_domains(own, first, len(target), progress.expert_index)
                    for begin in range(0, len(target), BLOCK):
                        mask = wanted[begin : begin + BLOCK]
                        if mask.any():
                            old = stored.rows(first + begin, first + begin + len(mask))
                            target[begin : begin + BLOCK][mask.to(target.device)] = old[mask].to(target)
        dist.barrier()  # before the main process may remove these checkpoints

    def _path(self, progress: StageProgress, step: int) -> str:
        return os.path.join(self.folder, f"step-{progress.expert_index}-{step:09d}")

    def _model_state(self) -> checkpoint.State:
        state = self.runtime.state(self.runtime.stage.trains)
        return {f"model/{name}": tensor for name, tensor in state.items()}

    def _group(self) -> dist.ProcessGroup:
        """A group of all processes for the background, made once."""
        opened = dist.group.WORLD
        assert opened is not None, "a stage runs in a process group"
        if self.environment.world_size == 1:
            return opened
        if not _groups or _groups[0][0] is not opened:
            _groups[:] = [(opened, dist.new_group(backend="gloo"))]
        return _groups[0][1]


def whole_checkpoints(folder: str) -> list[str]:
    """The checkpoints of a stage under way, oldest first; not those that are half-written."""
    paths = [os.path.join(folder, name) for name in ls(folder) if not name.endswith(WRITING)]
    return [path for path in paths if is_whole(path)]


def remove_progress(folder: str) -> None:
    """Removes all checkpoints of a stage under way."""
    _remove([folder])


def _remove(paths: Iterable[str], kept: Collection[str] = ()) -> None:
    """Removes what is not to be kept; what a store does not let go costs room, and is tried again next time."""
    for path in paths:
        try:
            if path not in kept:
                remove_checkpoint(path)
        except ValueError as error:
            logger.warning("%s; it is no longer needed", error)
