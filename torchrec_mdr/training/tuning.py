"""Tries a few settings on validation rows: `--tune N`."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from tabulate import tabulate

from torchrec_mdr.distributed.checkpoint import read_info
from torchrec_mdr.distributed.environment import Environment, on_main
from torchrec_mdr.storage import is_store, isfile, make_folder, read_json, remove_folder, write_json
from torchrec_mdr.training.bank_choice import with_banks
from torchrec_mdr.training.early_stopping import BestOverall, LogLosses
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import Options, parse
from torchrec_mdr.training.resuming import TRIAL_FOLDER, TUNING_FILE, resume_mode, run_path
from torchrec_mdr.training.trainer import Trainer

LOGLOSS_TOLERANCE = 0.01  # the trial with the highest AUC is taken among those so close to the lowest log loss
# factors of what the run has by itself, from and to; drawn evenly in their logarithm
_RATE, _ADAPT_RATE, _PENALTY = (0.3, 5.0), (0.1, 5.0), (0.1, 100.0)
_DROPOUT = (0.0, 0.4)


def tuned(given: Sequence[str], options: Options, environment: Environment) -> tuple[list[str], dict[str, Any] | None]:
    """The arguments of a run with the settings that did best in `--tune N` trials; called by all ranks.

    Trials run in a temporary folder; of several nodes beside the run's own, in a store below it, where all nodes see
    it. They know training and validation rows alone: test rows are not read.

    Args:
        given (Sequence[str]): the command line.
        options (Options): what it says.
        environment (Environment): rank, world size, device.

    Returns:
        tuple: the command line with the settings added, and what `tuning.json` will hold; None without trials.
    """
    if options.run.tune < 2:
        return list(given), None
    if resume_mode(options.run):
        known = on_main(lambda: _earlier(options), environment)
        if known is not None:
            return [*given, *known["trials"][known["chosen"]]["arguments"], "--tune=0"], known
    data = on_main(lambda: Experiment.prepare_data(options), environment)
    trials: list[dict[str, Any]] = []
    selection, chosen = BestOverall(options.run.tune, LOGLOSS_TOLERANCE), 0
    for number, arguments in enumerate(candidates(options)):
        if environment.is_main:
            print(f"tuning: trial {number + 1} of {options.run.tune}: {' '.join(arguments) or 'as it is'}", flush=True)
        with _trial_folder(options, environment) as folder:
            result = _trial([*given, *arguments, "--tune=0"], data, folder, environment)
        trials.append({"arguments": arguments, "auc": result["auc"], "logloss": result["logloss"]})
        if selection.update(result["auc"] or 0.0, torch.empty(0), LogLosses(result["logloss"], torch.empty(0))):
            chosen = number
    if environment.is_main:
        print(trial_table(trials, chosen))
    return [*given, *trials[chosen]["arguments"], "--tune=0"], {"trials": trials, "chosen": chosen}


def candidates(options: Options) -> list[list[str]]:
    """The arguments that each trial adds: none for the first, then quasi-random ones around the run's own settings."""
    stages = options.run.stages
    has_dropout = hasattr(options.backbone, "dropout")
    points = qmc.Halton(4, rng=np.random.default_rng(options.run.seed)).random(options.run.tune - 1)
    trials: list[list[str]] = [[]]
    for rate, adapt_rate, penalty, dropout in points:
        arguments = []
        for name in ("pretrain", "joint"):
            own = getattr(stages, name)
            factor = _within(_RATE, rate)
            values = {
                "learning_rate": own.learning_rate * factor,
                "embedding_learning_rate": own.embedding_learning_rate * factor,
                "embedding_l2": (own.embedding_l2 or 0.01) * _within(_PENALTY, penalty),
            }
            arguments += [f"--stages.{name}.{option}={value:.2g}" for option, value in values.items()]
        for name in ("adapt", "fuse", "gate"):
            value = getattr(stages, name).learning_rate * _within(_ADAPT_RATE, adapt_rate)
            arguments.append(f"--stages.{name}.learning_rate={value:.2g}")
        if has_dropout:
            arguments.append(f"--backbone_options.dropout={_DROPOUT[0] + dropout * (_DROPOUT[1] - _DROPOUT[0]):.2g}")
        trials.append(arguments)
    return trials


def write_tuning(folder: str, found: dict[str, Any] | None) -> None:
    """Writes `tuning.json`, where there were trials, and removes what killed trials have left in a store."""
    if found is not None:
        if is_store(folder):
            remove_folder(os.path.join(folder, TRIAL_FOLDER))
        write_json(os.path.join(folder, TUNING_FILE), found)


def trial_table(trials: Sequence[dict[str, Any]], chosen: int) -> str:
    """The trials on validation rows, and which is chosen."""
    lines = [
        [f"{number + 1}{' (chosen)' if number == chosen else ''}", f"{one['auc'] or 0:.4f}", f"{one['logloss']:.4f}"]
        for number, one in enumerate(trials)
    ]
    headers = ["trial", "validation AUC", "log loss"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", "right", "right"))


@contextmanager
def _trial_folder(options: Options, environment: Environment) -> Iterator[str]:
    """Where a trial runs, the same on all ranks; removed at the end."""
    run = run_path(options.run)
    if is_store(run):  # each has a name of its own, since the run's lock is not taken yet
        folder = on_main(lambda: os.path.join(run, TRIAL_FOLDER, uuid.uuid4().hex[:8]), environment)
        yield folder
        on_main(lambda: remove_folder(folder), environment)
        return
    parent = None
    if 0 < environment.local_world_size < environment.world_size:  # of several nodes, which share the run's disk
        parent = os.path.dirname(os.path.abspath(run))
        on_main(lambda: make_folder(parent, "--output_dir"), environment)
    with tempfile.TemporaryDirectory(dir=parent) as own:
        yield on_main(lambda: own, environment)
        on_main(lambda: None, environment)  # nobody leaves while another still reads


def _trial(arguments: list[str], data: str, folder: str, environment: Environment) -> dict[str, Any]:
    """The last stage's result on validation rows."""
    options = on_main(lambda: parse([*arguments, f"--output_dir={folder}"]), environment)
    trainer = Trainer(with_banks(Experiment.from_options(options, data), environment), folder, environment)
    trainer.run(evaluate_test=False)
    last = os.path.join(folder, "checkpoints", trainer.stages[-1].name)
    validation: dict[str, Any] = on_main(lambda: read_info(last, "entry")["entry"]["validation"], environment)
    return validation


def _earlier(options: Options) -> dict[str, Any] | None:
    """What an interrupted run has found already."""
    path = os.path.join(run_path(options.run), TUNING_FILE)
    found: dict[str, Any] | None = read_json(path) if isfile(path) else None
    return found


def _within(bounds: tuple[float, float], share: float) -> float:
    low, high = bounds
    return float(low * (high / low) ** share)
