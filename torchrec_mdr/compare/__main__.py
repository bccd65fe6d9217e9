"""The command ``python -m torchrec_mdr.compare``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torchrec_mdr.compare as method
from torchrec_mdr.compare.grid import Grid, read_grid
from torchrec_mdr.compare.plan import Run, plan
from torchrec_mdr.compare.reports import note_session, write_reports
from torchrec_mdr.compare.run import Workplace, make_jobs, run_jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    import argparse

    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog="python -m torchrec_mdr.compare",
        description=method.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", required=True, help="the grid file; examples/*.yaml show what it holds")
    parser.add_argument("--output_dir", required=True, help="holds runs, logs and reports")
    parser.add_argument("--data_dir", type=str | None, help="folder of a data set's original files")
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time")
    parser.add_argument("--report_only", action="store_true", help="write the reports of what is there, run nothing")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")  # notes to their own developers
    try:
        read = parser.parse_args(arguments)
        if read.parallel < 1:
            raise ValueError(f"--parallel must be at least 1, not {read.parallel}")
        grid = read_grid(read.config, read.data_dir)
        runs = plan(grid.cells)
        place = Workplace(Path(read.output_dir))
        with place.locked():
            return compare(grid, runs, place, read.parallel, read.report_only)
    except (ArgumentError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def compare(grid: Grid, runs: Sequence[Run], place: Workplace, parallel: int, report_only: bool) -> int:
    """Runs what is left to run, and writes the reports.

    Args:
        grid (Grid): what is compared.
        runs (Sequence[Run]): its runs.
        place (Workplace): where they work.
        parallel (int): processes at a time.
        report_only (bool): run nothing.

    Returns:
        int: 1 where a run failed, now or before, and 0 otherwise.

    Raises:
        ValueError: a run is there already, with other options.
    """
    jobs = make_jobs(runs, place)
    if jobs and not report_only:
        note_session(place, parallel)
        run_jobs(jobs, place, parallel, lambda: write_reports(grid, runs, place))
    write_reports(grid, runs, place)
    print(f"results: {place.root / 'report.html'}, results.md, results.csv and domains.csv")
    failed = [run.key for run in runs if run.key in place.failures]
    if failed:
        print(f"error: failed: {', '.join(failed)}; their logs are in {place.root / 'logs'}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
