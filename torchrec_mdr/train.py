"""Trains a method on a data set: `python -m torchrec_mdr.train --method mlora`, or by torchrun, or by TorchX."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.training.command import fail_with_sentence
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import Options, parse
from torchrec_mdr.training.run_folder import on_main, open_run_folder
from torchrec_mdr.training.trainer import RunResult, Trainer

logger = logging.getLogger(__name__)


@fail_with_sentence
def main(args: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    given = sys.argv[1:] if args is None else list(args)
    with _quiet(), process_group() as environment:
        try:
            options = on_main(lambda: parse(given), environment)
            result, folder = train(options, environment)
        except (ValueError, OSError) as error:
            _report(error, environment)
            if environment.is_main:
                raise
            return 2  # all ranks come to the same sentence, or rank 0's is the one that counts
        if environment.is_main and result is not None:
            _show(result, folder)
    return 0


def train(options: Options, environment: Environment) -> tuple[RunResult | None, str]:
    """Prepares the data on first use, then runs the method's stages.

    Args:
        options (Options): what the command line says.
        environment (Environment): rank, world size, device.

    Returns:
        tuple: the result, None where a single earlier stage was run; and the run's folder.

    Raises:
        ValueError: an impossible option, or data or a checkpoint that do not fit.
    """
    data = on_main(lambda: Experiment.prepare_data(options), environment)
    experiment = Experiment.from_options(options, data)
    folder = on_main(lambda: open_run_folder(options), environment)
    if environment.is_main:
        print(f"results go to {folder}")
    return Trainer(experiment, folder, environment).run(), folder


def _report(error: Exception, environment: Environment) -> None:
    """Tells torchrun, where there is one, why this process ends; it repeats that in its closing summary."""
    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
    if environment.world_size > 1:
        # torchrun ends all processes when the first has ended; each shall end by itself, with its own exit code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _show(result: RunResult, folder: str) -> None:
    """Prints and draws a result that is written already; a picture that fails is a warning."""
    from torchrec_mdr.report.tables import domain_table, parameter_table, stage_table

    metrics = result.metrics
    for table in (
        domain_table(metrics["test"], metrics["test_backbone"]),
        stage_table(metrics["stages"]),
        parameter_table(metrics["parameters"]),
    ):
        print(table)
    try:
        from torchrec_mdr.report.combination import MOST_DRAWN, draw_combination

        if result.combination is not None and len(result.combination.domains) <= MOST_DRAWN:
            title = f"{metrics['method']}: mean weights on test rows"
            draw_combination(result.combination, title, os.path.join(folder, "combination.png"))
    except Exception as error:  # a result does not depend on its picture
        logger.warning("combination.png could not be drawn: %s", error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides other packages' notes to their own developers for a while; the caller's log handlers stay as they are."""
    levels = {"": logging.ERROR, "torchrec": logging.ERROR, "torchrec_mdr": logging.INFO}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
