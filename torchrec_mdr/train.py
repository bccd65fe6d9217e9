"""Trains a method on a data set: `python -m torchrec_mdr.train --method mlora`, or by torchrun, or by TorchX."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import Options, fail_with_sentence, parse
from torchrec_mdr.training.run_folder import on_main, open_run_folder
from torchrec_mdr.training.trainer import RunResult, Trainer

logger = logging.getLogger(__name__)


@fail_with_sentence
def main(args: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    _quiet()
    options = parse(sys.argv[1:] if args is None else args)
    with process_group() as environment:
        try:
            result, folder = train(options, environment)
        except (ValueError, OSError) as error:
            # torchrun repeats it in its closing summary
            handler = get_error_handler()
            handler.initialize()
            handler.record_exception(error)
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
    data = str(on_main(lambda: Experiment.prepare_data(options), environment))
    experiment = Experiment.from_options(options, data)
    folder = str(on_main(lambda: open_run_folder(options), environment))
    if environment.is_main:
        print(f"results go to {folder}")
    return Trainer(experiment, folder, environment).run(), folder


def _show(result: RunResult, folder: str) -> None:
    """Prints and draws a result that is written already; a picture that fails is a warning."""
    from torchrec_mdr.report.tables import domain_table, parameter_table, stage_table

    metrics = result.metrics
    for table in (
        domain_table(metrics["test"], metrics["test_backbone"]),
        stage_table(metrics["stages"]),
        parameter_table(metrics["parameters"]),
    ):
        encoding = sys.stdout.encoding or "utf-8"  # which may lack the letters of a domain's name
        print(table.encode(encoding, "replace").decode(encoding))
    try:
        from torchrec_mdr.report.combination import MOST_DRAWN, draw_combination

        if result.combination is not None and len(result.combination.domains) <= MOST_DRAWN:
            title = f"{metrics['method']}: mean weights on test rows"
            draw_combination(result.combination, title, os.path.join(folder, "combination.png"))
    except Exception as error:  # a result does not depend on its picture
        logger.warning("combination.png could not be drawn: %s", error)


def _quiet() -> None:
    """Hides other packages' notes to their own developers, and leaves the caller's logging as it is."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torchrec_mdr").setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")


if __name__ == "__main__":
    sys.exit(main())
