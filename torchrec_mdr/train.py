"""Trains a method on a data set: `python -m torchrec_mdr.train --method mlora`, or by torchrun, or by TorchX."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchrec_mdr.data.prepare import prepare
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.distributed.environment import Environment, broadcast, process_group
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import Options, parse
from torchrec_mdr.training.trainer import Trainer

CONFIG_FILE = "config.yaml"


def main(args: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torchrec_mdr").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")  # notes to their own developers
    options = parse(sys.argv[1:] if args is None else args)
    with process_group() as environment:
        try:
            train(options, environment)
        except ValueError as error:
            # all ranks come to the same sentence, or rank 0's is the one that counts
            if environment.is_main:
                print(f"error: {error}", file=sys.stderr)
            # torchrun repeats it in its closing summary
            handler = get_error_handler()
            handler.initialize()
            handler.record_exception(error)
            return 2
    return 0


def train(options: Options, environment: Environment) -> dict[str, Any] | None:
    """Prepares the data on first use, then runs the method's stages.

    Args:
        options (Options): what the command line says.
        environment (Environment): rank, world size, device.

    Returns:
        dict | None: the content of `metrics.json`; None where a single earlier stage was run.

    Raises:
        ValueError: an impossible option, or data or a checkpoint that do not fit.
    """
    folder = str(on_main(lambda: _prepared(options), environment))
    schema = Schema.load(folder)
    recipe = Experiment(options.run, folder, schema, _divisions(options.run, schema), options.backbone, options.method)
    output_dir = str(on_main(lambda: _open_output(options), environment))
    if environment.is_main:
        print(f"results go to {output_dir}")
    return Trainer(recipe, output_dir, environment).run()


def on_main(work: Any, environment: Environment) -> object:
    """What work() returns on the main process, on all; its ValueError too."""
    answer: object = None
    if environment.is_main:
        try:
            answer = work()
        except ValueError as error:
            answer = error
    answer = broadcast(answer, environment)
    if isinstance(answer, ValueError):
        raise answer
    return answer


def _prepared(options: Options) -> str:
    run = options.run
    if options.dataset is None:
        return run.dataset
    common = {"data_dir": run.data_dir, "division": run.division, "protocol": run.protocol}
    return prepare(run.dataset, **common, **options.dataset)


def _divisions(run: RunConfig, schema: Schema) -> tuple[Division, ...]:
    auxiliary = run.auxiliary_division or []
    names = [run.division or schema.divisions[0].name, *([auxiliary] if isinstance(auxiliary, str) else auxiliary)]
    if len(set(names)) != len(names):
        raise ValueError(f"the divisions {', '.join(names)} must differ from each other")
    for domain in run.domains or []:
        size = schema.division(names[0]).num_domains
        if not 0 <= domain < size:
            raise ValueError(f"--domains names {domain}, outside division '{names[0]}' with domains 0 to {size - 1}")
    return tuple(schema.division(name) for name in names)


def _open_output(options: Options) -> str:
    run = options.run
    path = run.output_dir
    if path is None:
        if run.resume:
            raise ValueError("--resume needs --output_dir, the folder of the run to go on with")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        data = os.path.basename(os.path.normpath(run.dataset))
        path = os.path.join("runs", f"{run.method}-{run.backbone}-{data}-{stamp}-{os.getpid()}")
    used = os.path.isdir(path) and os.listdir(path)
    if used and not run.resume and run.stage is None:
        raise ValueError(f"output folder {path} is in use; name another one, or go on with its run by --resume")
    if run.resume and not os.path.exists(os.path.join(path, CONFIG_FILE)):
        raise ValueError(f"there is no run to resume in {path}; leave out --resume")
    os.makedirs(os.path.join(path, "checkpoints"), exist_ok=True)
    temporary = os.path.join(path, f"{CONFIG_FILE}.writing")
    with open(temporary, "w") as file:
        file.write(options.resolved)
    os.replace(temporary, os.path.join(path, CONFIG_FILE))
    return path


if __name__ == "__main__":
    sys.exit(main())
