"""The command ``python -m torchrec_mdr.compare``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from jsonargparse import Namespace

import torchrec_mdr.compare as method
from torchrec_mdr.compare.grid import Grid, read_grid
from torchrec_mdr.compare.launchers import Launcher, LocalProcesses, SchedulerJobs
from torchrec_mdr.compare.plan import Run, plan
from torchrec_mdr.compare.reports import note_session, write_reports
from torchrec_mdr.compare.run import Workplace, make_jobs, run_jobs
from torchrec_mdr.compare.settings import check_settings
from torchrec_mdr.storage import is_store, located
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.compare",
        description=method.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="the grid file; examples/*.yaml show what it holds")
    parser.add_argument("--output_dir", required=True, help="holds runs, logs and reports")
    parser.add_argument("--data_dir", type=str | None, help="folder of a data set's original files")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--report_only", action="store_true", help="write the reports of what is there, run nothing")
    parser.add_argument("--scheduler", type=str | None, help="a scheduler of TorchX's, such as slurm or kubernetes")
    parser.add_argument("--scheduler_args", default="", help="its options: partition=p,time=60 (see torchx runopts)")
    parser.add_argument(
        "--component_args", default="", help="of a job there: '-j 1x2 --gpu 2' (see torchx run mdr.train --help)"
    )
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")  # notes to their own developers
    read = parser.parse_args(arguments)
    if read.parallel < 1:
        raise ValueError(f"--parallel must be at least 1, not {read.parallel}")
    if not read.output_dir:
        raise ValueError("--output_dir is empty; name a folder")
    if read.scheduler is None and (read.scheduler_args or read.component_args):
        raise ValueError("--scheduler_args and --component_args are for jobs of a scheduler; name it with --scheduler")
    try:
        grid = read_grid(read.config, read.data_dir)
        runs = plan(grid.cells)
        check_settings(grid, runs)
        root = located(read.output_dir)
        place = Workplace(root if is_store(root) else os.path.normpath(root))
        with place.locked():
            return compare(grid, runs, place, read)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def compare(grid: Grid, runs: Sequence[Run], place: Workplace, read: Namespace) -> int:
    """Runs what is left to run, and writes the reports.

    Args:
        grid (Grid): what is compared.
        runs (Sequence[Run]): its runs.
        place (Workplace): where they leave their results.
        read (Namespace): the command line.

    Returns:
        int: 1 where a run failed, now or before, and 0 otherwise.

    Raises:
        ValueError: a run is there already, with other options, or the scheduler cannot be used.
    """
    jobs = make_jobs(runs, place)
    if jobs and not read.report_only:
        launcher = _launcher(read, place)
        note_session(place, launcher, read.parallel)
        run_jobs(jobs, place, launcher, read.parallel, lambda: write_reports(grid, runs, place))
    write_reports(grid, runs, place)
    print(f"results: {place.path('report.html')}, results.md, results.csv and domains.csv")
    failed = [run.key for run in runs if run.key in place.failures]
    if failed:
        print(f"error: failed: {', '.join(failed)}; their logs are in {place.path('logs')}", file=sys.stderr)
    return int(bool(failed))


def _launcher(read: Namespace, place: Workplace) -> Launcher:
    if read.scheduler is None:
        return LocalProcesses(read.parallel)
    return SchedulerJobs(read.scheduler, read.scheduler_args, read.component_args, place.path("jobs.json"))


if __name__ == "__main__":
    sys.exit(main())
