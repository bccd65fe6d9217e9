"""The folder of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar, cast

from torchrec_mdr.distributed.environment import Environment, broadcast
from torchrec_mdr.storage import make_folder, write_text
from torchrec_mdr.training.options import Options

CONFIG_FILE = "config.yaml"
T = TypeVar("T")


def on_main(work: Callable[[], T], environment: Environment) -> T:
    """What work() returns on the main process, on all; what it raises for bad input, or to end the process, too."""
    answer: T | None = None
    problem: BaseException | None = None
    if environment.is_main:
        try:
            answer = work()
        except (ValueError, OSError, SystemExit) as error:
            problem = error
    answer, problem = cast(tuple[T, BaseException | None], broadcast((answer, problem), environment))
    if problem is not None:
        raise problem
    return answer


def open_run_folder(options: Options) -> str:
    """Makes the run's folder, or takes up an interrupted run's, and writes the resolved configuration.

    Returns:
        str: the folder.

    Raises:
        ValueError: it is in use, cannot be written, or holds no run to go on with.
    """
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
        raise ValueError(
            f"output folder {path} is in use; name another one, delete it, or go on with its run by --resume"
        )
    if run.resume and not os.path.exists(os.path.join(path, CONFIG_FILE)):
        raise ValueError(f"there is no run to resume in {path}; leave out --resume")
    make_folder(path, "--output_dir")
    make_folder(os.path.join(path, "checkpoints"), "--output_dir")
    write_text(os.path.join(path, CONFIG_FILE), options.resolved)
    return path
