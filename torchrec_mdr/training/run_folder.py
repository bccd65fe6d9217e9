"""The folder of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_mdr.data.feature_files import FEATURE_FILES, copy_features
from torchrec_mdr.data.schema import SCHEMA_FILE
from torchrec_mdr.storage import (
    DIGESTS_FILE,
    damaged_files,
    digest_of,
    exists,
    is_whole,
    isfile,
    ls,
    make_folder,
    open_write,
    read_digests,
    read_json,
    read_text,
    remove,
    remove_folder,
    write_digests,
    write_json,
    write_text,
)
from torchrec_mdr.training.config import RunConfig
from torchrec_mdr.training.options import Options
from torchrec_mdr.training.resuming import TRIAL_FOLDER, TUNING_FILE, check_options, resume_mode, run_path, sources
from torchrec_mdr.training.run_lock import LOCK_FILE, RunLock

CONFIG_FILE = "config.yaml"
METRICS_FILE, COMBINATION_FILE, DOMAINS_FILE = "metrics.json", "combination.json", "domains.parquet"
STARTED_FILE = "started_from.json"
# those with digests
KEPT_FILES = (CONFIG_FILE, STARTED_FILE, SCHEMA_FILE, *FEATURE_FILES, METRICS_FILE, COMBINATION_FILE, DOMAINS_FILE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, ready to be written to.

    Args:
        path (str): the folder.
        resumes (bool): whether the run in it goes on.
        results (dict | None): the content of `metrics.json`, where that run is finished.
    """

    path: str
    resumes: bool = False
    results: dict[str, Any] | None = None


def begun_with(run: RunConfig) -> dict[str, Any]:
    """What a run that goes on was begun with beside its options; nothing where none does."""
    path = run_path(run) if resume_mode(run) is not False or run.stage is not None else ""
    started = os.path.join(path, STARTED_FILE)
    goes_on = path and exists(os.path.join(path, CONFIG_FILE)) and exists(started)
    return read_json(started) if goes_on else {}


def open_run_folder(options: Options, data: str, lock: RunLock, banks: str | None = "replicated") -> RunFolder:
    """Makes the run's folder, or takes up an interrupted run's, and writes its options, schema and feature plan.

    Args:
        options (Options): of the run.
        data (str): the prepared data set, whose schema and plan travel with the run.
        lock (RunLock): is taken, and stays so.
        banks (str | None): where its banks are; what `auto` stands for is decided when a run begins.

    Raises:
        ValueError: it is in use, cannot be written, or holds no run to go on with, or one of other options or data.
    """
    run = options.run
    path, resume = run_path(run), resume_mode(run)
    if resume is True and not exists(os.path.join(path, CONFIG_FILE)):
        raise ValueError(f"there is no run to resume in {path}; leave out --resume, or write --resume auto")
    if resume is False and run.stage is None and ls(path):
        raise ValueError(
            f"output folder {path} is in use; name another one, delete it, or go on with its run by --resume"
        )
    make_folder(path, "--output_dir")
    lock.take(path, waits=resume == "auto")
    config, started = os.path.join(path, CONFIG_FILE), os.path.join(path, STARTED_FILE)
    resumes = resume is not False and exists(config)
    start = sources(run)  # reads what may be a large file
    if resume == "auto" and not resumes and not _has_only_begun(path):
        raise ValueError(f"output folder {path} holds something, but no run to go on with; name another one")
    if resumes:
        check_files(path)
        before = read_json(started) if exists(started) else {}
        moved = [name for name, digest in start.items() if before.get(name) == digest]
        check_options(path, read_text(config), options.resolved, moved)
        _check_schema(path, data)
        metrics = os.path.join(path, METRICS_FILE)
        if run.stage is None and exists(metrics):
            return RunFolder(path, True, read_json(metrics))
    elif run.stage is not None and is_whole(os.path.join(path, "checkpoints", run.stage)):
        raise ValueError(
            f"stage '{run.stage}' is finished in {path}; name another output folder, or evaluate it again with --resume"
        )
    make_folder(os.path.join(path, "checkpoints"), "--output_dir")
    _remove_digests(path)  # a kill from here on leaves none, and none that are wrong
    write_json(started, {**start, "banks": banks})
    write_text(os.path.join(path, SCHEMA_FILE), read_text(os.path.join(data, SCHEMA_FILE)))
    copy_features(data, path)
    write_text(config, options.resolved)  # the last: from here on there is a run to go on with
    _keep_digests(path)
    return RunFolder(path, resumes)


def withdraw(path: str) -> None:
    """Takes back what a run has written that came to no training, so that its folder is free again; its lock stays.

    Args:
        path (str): a folder that :func:`open_run_folder` has found empty, or with what a run writes first.

    Raises:
        ValueError: something cannot be removed.
    """
    for name in (*KEPT_FILES, DIGESTS_FILE):  # the options first: without them there is no run to go on with
        remove(os.path.join(path, name))
    for name in ("events", "checkpoints"):
        remove_folder(os.path.join(path, name))


def _has_only_begun(path: str) -> bool:
    """Whether a folder holds nothing but what a run writes before its options."""
    names = {LOCK_FILE, TUNING_FILE, TRIAL_FOLDER, STARTED_FILE, SCHEMA_FILE, *FEATURE_FILES}
    found = {name.removesuffix(".writing") for name in ls(path)}
    begun = not ls(os.path.join(path, "checkpoints"))
    return found <= {*names, CONFIG_FILE, "checkpoints"} and begun


def _check_schema(path: str, data: str) -> None:
    own = os.path.join(path, SCHEMA_FILE)
    if exists(own) and read_text(own) != read_text(os.path.join(data, SCHEMA_FILE)):
        raise ValueError(
            f"the run in {path} was made on other data: its {SCHEMA_FILE} is not that of {data}; go on with the data "
            "it began with, or name another output folder without --resume"
        )


def write_results(
    folder: str, metrics: Mapping[str, Any], combination: Mapping[str, Any] | None, domains: pa.Table | None = None
) -> None:
    """Writes `metrics.json`, `combination.json` where a method combines components, and a table of very many domains.

    Raises:
        ValueError: they cannot be written.
    """
    _remove_digests(folder)
    write_json(os.path.join(folder, METRICS_FILE), metrics)
    if combination is not None:
        write_json(os.path.join(folder, COMBINATION_FILE), combination)
    if domains is not None:
        with open_write(os.path.join(folder, DOMAINS_FILE)) as file:
            pq.write_table(domains, file)
    _keep_digests(folder)


def _remove_digests(folder: str) -> None:
    """Forgets the digests of a run's own files, before these change."""
    remove(os.path.join(folder, DIGESTS_FILE))


def _keep_digests(folder: str) -> None:
    """Keeps the digests of a run's own files as they are now."""
    found = [name for name in KEPT_FILES if isfile(os.path.join(folder, name))]
    write_digests(folder, {name: digest_of(os.path.join(folder, name)) for name in found})


def check_files(folder: str) -> None:
    """Checks a run's own files against their digests, where it has some.

    Raises:
        ValueError: one of them is not what was written.
    """
    digests = read_digests(folder)
    if digests is None:
        logger.info("%s has no %s: its files are not checked", folder, DIGESTS_FILE)
        return
    results = (METRICS_FILE, COMBINATION_FILE, DOMAINS_FILE)  # may be lost: they are made again
    there = [name for name in KEPT_FILES if name not in results or exists(os.path.join(folder, name))]
    wrong = damaged_files(folder, digests, there)
    if wrong:
        raise ValueError(f"{wrong[0]}; restore it from a copy, or begin anew in another folder")
