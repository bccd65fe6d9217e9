"""Trains a method on a data set: `python -m torchrec_mdr.train --method mlora`, or by torchrun, or by TorchX."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchrec_mdr.data.checks import check_values
from torchrec_mdr.data.record_batches import RecordBatches
from torchrec_mdr.data.schema import SCHEMA_FILE
from torchrec_mdr.distributed.environment import Environment, check_seen, on_every, on_main, process_group
from torchrec_mdr.distributed.watch import EXIT_CODE, WHAT_THEN, is_broken_connection
from torchrec_mdr.inference.hand_over import write_adapters
from torchrec_mdr.storage import full_path, isfile
from torchrec_mdr.training.bank_choice import with_banks
from torchrec_mdr.training.command import fail_with_sentence, quiet_libraries
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.memory import check_memory
from torchrec_mdr.training.options import Options, parse
from torchrec_mdr.training.preemption import Preempted, stop_signals
from torchrec_mdr.training.run_folder import CONFIG_FILE, begun_with, open_run_folder, withdraw
from torchrec_mdr.training.run_lock import RunLock
from torchrec_mdr.training.trainer import RunResult, Trainer
from torchrec_mdr.training.tuning import tuned, write_tuning

_FAREWELL_SECONDS = 3.0  # that others have to come to the same error; one that does not is not waited for longer

logger = logging.getLogger(__name__)


@fail_with_sentence
def main(args: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    given = sys.argv[1:] if args is None else list(args)
    with quiet_libraries(), process_group() as environment:
        try:
            with stop_signals.handled():
                options, result, folder = run(given, environment)
        except Preempted as stop:
            if environment.is_main:
                print(f"{stop}; the same command with --resume auto goes on", file=sys.stderr)
            return EXIT_CODE
        except Exception as error:
            if environment.watch is not None and is_broken_connection(error):
                print(f"error: {environment.watch.who_is_lost()}; {WHAT_THEN}", file=sys.stderr)
                return EXIT_CODE
            if not isinstance(error, ValueError | OSError):
                raise
            _report(error, environment)
            if environment.is_main:
                raise
            return 2  # all ranks come to the same sentence, or rank 0's is the one that counts
        if environment.is_main and result is not None:
            _show(result, folder)
            if options.run.adapter_files:
                print(f"adapters are in {write_adapters(folder)}")
    return 0


def train(dataset: str | RecordBatches, output_dir: str | None = None, **options: Any) -> dict[str, Any] | None:
    """Trains a method on a data set, in this process; what the command does, from Python.

    Args:
        dataset (str | RecordBatches): a prepared folder, a data set's name, or record batches.
        output_dir (str | None): a new folder for the run; by default one below runs/.
        **options (Any): the command's, dotted ones as `**{"stages.adapt.epochs": 3}`.

    Returns:
        dict | None: the content of `metrics.json`; None where a single earlier stage was run.

    Raises:
        ValueError: an impossible option, or data or a checkpoint that do not fit.

    Example::

        >>> import tempfile
        >>> small = {"dataset_options.rows": 1000, "dataset_options.num_domains": 3, "stages.pretrain.epochs": 1}
        >>> metrics = train("synthetic", tempfile.mkdtemp(), method="mix", **small)
        results go to ...
        >>> metrics["test"]["rows"], list(metrics["test"]["domains"])
        (100, ['0', '1', '2'])
    """
    name = dataset if isinstance(dataset, str) else dataset.folder
    if isfile(os.path.join(name, SCHEMA_FILE)):
        name = os.path.join(full_path(name), "")  # a slash tells a folder from a data set's name
    given = {"dataset": name, "output_dir": output_dir, **options}
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    with quiet_libraries(), process_group() as environment:
        _, result, _ = run([f"--{key}={value}" for key, value in written.items()], environment)
    return None if result is None else result.metrics


def run(given: Sequence[str], environment: Environment) -> tuple[Options, RunResult | None, str]:
    """Prepares the data on first use, tries settings where that is asked for, then runs the method's stages.

    Args:
        given (Sequence[str]): the command line.
        environment (Environment): rank, world size, device.

    Returns:
        tuple: what the command line says; the result, None where a single earlier stage was run; and the run's folder.

    Raises:
        ValueError: an impossible option, or data or a checkpoint that do not fit.
    """
    options = on_main(lambda: parse(given), environment)
    arguments, found = tuned(given, options, environment)
    if found is not None:
        options = on_main(lambda: parse(arguments), environment)
    data = on_main(lambda: Experiment.prepare_data(options), environment)
    if environment.watch is not None:
        environment.watch.seconds = options.run.hang_seconds
    check_seen(os.path.join(data, SCHEMA_FILE), "--dataset or $MDR_CACHE", environment)
    begun = on_main(lambda: begun_with(options.run).get("banks"), environment)
    experiment = with_banks(on_every(lambda: Experiment.from_options(options, data)), environment, begun)
    on_main(lambda: check_memory(experiment, environment), environment)
    names = [division.name for division in experiment.divisions]
    on_main(lambda: check_values(data, experiment.schema, names), environment)
    lock = RunLock()
    try:
        folder = on_main(lambda: open_run_folder(options, data, lock, experiment.banks), environment)
        check_seen(os.path.join(folder.path, CONFIG_FILE), "--output_dir", environment)
        if folder.results is not None:
            if environment.is_main:
                print(f"the run in {folder.path} is finished")
            return options, RunResult(folder.results, None), folder.path
        on_main(lambda: write_tuning(folder.path, found), environment)
        if environment.is_main:
            print(f"results go to {folder.path}", flush=True)
        trainer = Trainer(experiment, folder.path, environment, folder.resumes, lock.check)
        try:
            return options, trainer.run(), folder.path
        except ValueError:
            is_new = not folder.resumes and options.run.stage is None and found is None
            if is_new and not trainer.has_trained and environment.is_main:
                lock.check()  # the folder may be another's by now
                withdraw(folder.path)
            raise
    finally:
        lock.release()


def _report(error: Exception, environment: Environment) -> None:
    """Tells torchrun, where there is one, why this process ends; it repeats that in its closing summary."""
    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
    if environment.world_size > 1:
        # torchrun ends all processes when the first has ended; each shall end by itself, with its own exit code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if environment.is_main and environment.watch is not None:
            environment.watch.wait_for_others(_FAREWELL_SECONDS)


def _show(result: RunResult, folder: str) -> None:
    """Prints and draws a result that is written already; a picture that fails is a warning."""
    from torchrec_mdr.report.tables import domain_table, knowing_the_domain, parameter_table, stage_table

    metrics = result.metrics
    for table in (
        domain_table(metrics["test"], metrics["test_backbone"], metrics.get("gain")),
        knowing_the_domain(metrics),
        stage_table(metrics["stages"]),
        parameter_table(metrics["parameters"]),
    ):
        if table:
            print(table)
    for stage in metrics["stages"]:
        if stage.get("note"):
            print(f"note: {stage['note']}")
    try:
        from torchrec_mdr.report.combination import MOST_DRAWN, draw_combination

        if result.combination is not None and len(result.combination.domains) <= MOST_DRAWN:
            title = f"{metrics['method']}: mean weights on test rows"
            draw_combination(result.combination, title, os.path.join(folder, "combination.png"))
    except Exception as error:  # a result does not depend on its picture
        logger.warning("combination.png could not be drawn: %s", error)


if __name__ == "__main__":
    sys.exit(main())
