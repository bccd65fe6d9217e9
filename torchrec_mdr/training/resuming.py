"""Whether a run goes on with an earlier one, in which folder, and with which options."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import yaml

from torchrec_mdr.storage import DIGESTS_FILE, digest_of, isdir, isfile
from torchrec_mdr.training.config import RunConfig

TUNING_FILE = "tuning.json"
TRIAL_FOLDER = "trial"  # below a run in a store, while settings are tried
# what a run may go on with otherwise than it began: names, or their last parts in stages
_FREE = {"resume", "output_dir", "data_dir", "stage", "adapter_files", "tune"}
_FREE |= {"checkpoint_seconds", "keep_checkpoints", "hang_seconds"}
_FREE_OF_STAGES = {"epochs", "patience", "patience_rows"}
_RESTARTS, _JOB = "MDR_RESUME", "TORCHX_JOB_ID"  # set by our component, and by TorchX


def resume_mode(run: RunConfig) -> bool | Literal["auto"]:
    """`--resume`, and `auto` where it is left out and the launcher starts failed runs again.

    That is torchrun with `--max-restarts`, our component with `max_retries`, or a job that Slurm has requeued.
    """
    if run.resume is not None:
        return run.resume
    number = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    restarts = number.isdecimal() and int(number) > 0
    return "auto" if restarts or os.environ.get(_RESTARTS) == "auto" or "SLURM_RESTART_COUNT" in os.environ else False


def run_path(run: RunConfig) -> str:
    """`--output_dir`, or by default a folder below runs/ that a restart of the same job finds again.

    Raises:
        ValueError: `--resume` without a folder.
    """
    if run.output_dir is not None:
        return run.output_dir
    resume = resume_mode(run)
    if resume is True:
        raise ValueError("--resume needs --output_dir, the folder of the run to go on with")
    name = os.path.basename(os.path.normpath(run.dataset))
    return os.path.join("runs", f"{run.method}-{run.backbone}-{name}-{_job(resume == 'auto')}")


def _job(restarts: bool) -> str:
    """The launcher's name for this job where there is one, else the time and this process."""
    named = os.environ.get(_JOB, "").rpartition("/")[2]
    if named:
        return named
    if restarts:
        for variable in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
            if os.environ.get(variable, "none") not in ("", "none"):
                return os.environ[variable]
        return f"agent-{os.getppid()}"  # torchrun's, which outlives the processes that it starts
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def sources(run: RunConfig) -> dict[str, str]:
    """Digests of what a run starts from, by option: a checkpoint may lie elsewhere when the run goes on."""
    found = {}
    for option in ("init_checkpoint", "init_adapters"):
        path = getattr(run, option)
        if path is not None:
            content = os.path.join(path, DIGESTS_FILE) if isdir(path) else path
            if isfile(content):
                found[option] = digest_of(content)
    return found


def check_options(folder: str, stored: str, wanted: str, moved: Collection[str] = ()) -> None:
    """Checks that a run is gone on with as it was begun.

    Args:
        folder (str): of the run.
        stored (str): its `config.yaml`.
        wanted (str): what the command line says, in the same form.
        moved (Collection[str]): options that name the same content in another place.

    Raises:
        ValueError: an option differs that may not; names it and both values.
    """
    before, now = dict(_flat(yaml.safe_load(stored) or {})), dict(_flat(yaml.safe_load(wanted) or {}))
    for name in sorted(before.keys() & now.keys(), key=lambda name: (name.count("."), name)):
        if before[name] != now[name] and name not in moved and not _may_change(name):
            raise ValueError(
                f"the run in {folder} was begun with --{name} {before[name]}, and is now asked to go on with "
                f"{now[name]}; leave the option as it was, or name another --output_dir"
            )


def _may_change(name: str) -> bool:
    stage = name.startswith("stages.") and name.rpartition(".")[2] in _FREE_OF_STAGES
    return name in _FREE or stage


def _flat(content: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their dotted names."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{outer}{name}.")
        else:
            yield f"{outer}{name}", value
