"""Writes what a comparison has come to: two CSV files, Markdown and a page; and remembers how it was made."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

from torchrec_mdr.compare.figures import Comparison
from torchrec_mdr.compare.grid import Grid
from torchrec_mdr.compare.launchers import Launcher, cores
from torchrec_mdr.compare.page import page
from torchrec_mdr.compare.plan import Run
from torchrec_mdr.compare.results import read_results, write_csv
from torchrec_mdr.compare.run import Workplace
from torchrec_mdr.compare.settings import settings_facts
from torchrec_mdr.compare.statistics import make_groups
from torchrec_mdr.compare.tables import markdown
from torchrec_mdr.registry import METHODS
from torchrec_mdr.storage import exists, read_json, write_json, write_text

SESSIONS_FILE = "sessions.json"
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "scipy")


def write_reports(grid: Grid, runs: Sequence[Run], place: Workplace) -> None:
    """Writes `results.csv`, `domains.csv`, `results.md` and `report.html`, each whole or not at all."""
    place.check()
    table, domains = read_results(runs, place)
    write_csv(table, place.path("results.csv"))
    write_csv(domains, place.path("domains.csv"))
    sessions = read_sessions(place)
    groups = make_groups(table, domains, grid.baselines, grid.published)
    comparison = Comparison(
        grid.title, _progress(table), groups, _remarks(grid, table, sessions), _facts(grid, runs, sessions), grid.text
    )
    write_text(place.path("results.md"), markdown(comparison))
    write_text(place.path("report.html"), page(comparison))


def note_session(place: Workplace, launcher: Launcher, parallel: int) -> None:
    """Remembers one call that is about to run something."""
    session = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{platform.machine()}, {cores()} cores",
        "scheduler": launcher.scheduler,
        "parallel": parallel,
        "threads": launcher.threads,
    }
    write_json(place.path(SESSIONS_FILE), {"sessions": [*read_sessions(place), session]})


def read_sessions(place: Workplace) -> list[dict[str, Any]]:
    """The calls so far that ran something."""
    path = place.path(SESSIONS_FILE)
    sessions: list[dict[str, Any]] = read_json(path)["sessions"] if exists(path) else []
    return sessions


def _progress(runs: pl.DataFrame) -> str:
    counts = runs["status"].value_counts().rows()
    others = sorted(f"{count} {status}" for status, count in counts if status != "finished")
    return f"{dict(counts).get('finished', 0)} of {len(runs)} runs have finished" + "".join(f", {o}" for o in others)


def _remarks(grid: Grid, runs: pl.DataFrame, sessions: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    remarks = []
    most = max((session["parallel"] for session in sessions if session.get("scheduler") is None), default=1)
    if most > 1:
        remarks.append(
            f"Samples a second and seconds were measured with up to {most} runs side by side on one machine; a run "
            "alone is faster."
        )
    per_variant = runs.group_by("dataset", "division", "backbone", "variant").len()["len"]
    if (per_variant == 1).any():
        remarks.append("Where there is one seed, there is no spread: small differences may be noise between seeds.")
    if grid.unequal:
        remarks.append('Settings may differ between variants; "How this was made" names them.')
    if not all(METHODS[grid.variants[name]].is_baseline for name in grid.baselines):
        remarks.append(f"Counted as baselines: {', '.join(grid.baselines)}.")
    what = ["status", "dataset", "division", "backbone", "variant", "reason"]
    stopped = runs.filter(pl.col("status").is_in(["failed", "refused"]))
    for (status, *names, reason), lines in stopped.group_by(what, maintain_order=True):
        seeds = ", ".join(map(str, lines["seed"]))
        remarks.append(f"{status}: {', '.join(map(str, names))}, seed {seeds}: {reason}")
    return tuple(remarks)


def _facts(grid: Grid, runs: Sequence[Run], sessions: Sequence[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    seeds = sorted({cell.seed for cell in grid.cells})
    facts = [("seeds", ", ".join(map(str, seeds))), *settings_facts(runs)]
    for session in sessions:
        versions = ", ".join(f"{name} {number}" for name, number in session["versions"].items())
        scheduler = session.get("scheduler")
        where = f"on {scheduler}" if scheduler else f"with {session['threads']} threads each"
        facts.append(
            (
                f"call of {session['started']}",
                f"{session['command']} | commit {session['commit'] or 'unknown'} | {versions} | {session['machine']}, "
                f"{session['parallel']} at a time {where}",
            )
        )
    return tuple(facts)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # one of the two builds of fbgemm
    return found


def _commit() -> str | None:
    """The project's commit, and whether there is more than it holds; None where it is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        return f"{commit}, with changes" if git("status", "--porcelain").strip() else commit
    except (OSError, subprocess.CalledProcessError):
        return None
