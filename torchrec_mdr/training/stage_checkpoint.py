"""Checkpoints of a stage under way, from which an interrupted run goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.optim.averaging import WeightAverage
from torchrec_mdr.training.early_stopping import EarlyStopping
from torchrec_mdr.training.stage_runtime import StageRuntime

AVERAGED = ".averaged"  # ends the names of folders with averaged weights


@dataclass
class StageProgress:
    """How far a stage has come, in work that is finished and saved.

    Args:
        expert_index: the pass under way.
        epoch: epochs of that pass that are complete.
        segment: validations since then.
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

    Args:
        folder (str): holds one checkpoint a validation; those that are no longer needed are removed.
        runtime (StageRuntime): the stage's model and optimizers.
        environment (Environment): rank, world size, device.
    """

    def __init__(self, folder: str, runtime: StageRuntime, environment: Environment) -> None:
        self.folder = folder
        self.runtime = runtime
        self.environment = environment
        self.average: WeightAverage | None = None
        self.last_saved: str | None = None

    def close(self) -> None:
        """Removes all of them."""
        if self.environment.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start_average(self, decay: float) -> None:
        """Averages the weights from now on; a decay of 0 does not."""
        self.average = WeightAverage(self._model_state().values(), decay) if decay else None

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
        """Writes a checkpoint; called by all ranks."""
        state = self._model_state()
        state |= {f"optimizer/{name}": tensor for name, tensor in self.runtime.optimizer.tensors().items()}
        state |= {f"selection/{name}": tensor for name, tensor in selection.tensors().items()}
        path = self._path(progress, progress.step)
        result = self._result_path(progress, progress.step)
        if result != path:
            with self.averaged():
                checkpoint.save(result, self._model_state(), {})
        checkpoint.save(path, state, {"progress": asdict(progress), "selection": selection.info()})
        self.last_saved = path
        if self.environment.is_main:
            keep = {path, result, self._result_path(progress, progress.best_step)}
            for name in os.listdir(self.folder):
                if os.path.join(self.folder, name) not in keep:
                    shutil.rmtree(os.path.join(self.folder, name))

    def newest(self) -> tuple[str, StageProgress] | None:
        """The last checkpoint that is whole, and how far the stage had come; None where there is none."""
        names = sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []
        names = [name for name in names if not name.endswith((".writing", AVERAGED))]
        if not names:
            return None
        path = os.path.join(self.folder, names[-1])
        return path, StageProgress(**checkpoint.read_info(path)["progress"])

    def restore(self, path: str, progress: StageProgress, selection: EarlyStopping) -> None:
        """Takes up the state of a checkpoint; called by all ranks."""
        if self.average is not None:
            checkpoint.load(path + AVERAGED, self._model_state())
            self.average.restart(progress.step)
        optimizer = self.runtime.optimizer
        fused = {f"optimizer/{name}": tensor for name, tensor in optimizer.fused_tensors().items()}
        checkpoint.load(path, self._model_state() | fused)
        stored = checkpoint.load_new(path, "optimizer/", self.environment.device)
        optimizer.restore({name: tensor for name, tensor in stored.items() if not name.startswith("fused/")})
        if optimizer.fused is not None:
            optimizer.fused.set_optimizer_step(progress.step)
        info = checkpoint.read_info(path)["selection"]
        selection.restore(info, checkpoint.load_new(path, "selection/", self.environment.device))
        self.last_saved = path

    def load_best(self, progress: StageProgress) -> None:
        """Puts the best weights so far into the model; called by all ranks."""
        checkpoint.load(self._result_path(progress, progress.best_step), self._model_state())

    def _path(self, progress: StageProgress, step: int) -> str:
        return os.path.join(self.folder, f"step-{progress.expert_index}-{step:09d}")

    def _result_path(self, progress: StageProgress, step: int) -> str:
        """Where the weights that a validation judged are."""
        return self._path(progress, step) + (AVERAGED if self.average is not None else "")

    def _model_state(self) -> checkpoint.State:
        state = self.runtime.state(self.runtime.stage.trains)
        return {f"model/{name}": tensor for name, tensor in state.items()}
