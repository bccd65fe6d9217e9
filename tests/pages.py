"""README and the pages in docs/: their blocks of code, what notes ask of them, and how they are run.

A note is a comment above a block: `<!-- test: NOTE -->`. It says `full` (run by make test-full only), `output` (what
the block before it prints), `output of the default run`, `file PATH` (an excerpt of that file), or the name of a check.
Blocks of `python` and `sh` run, page by page; other languages are shown only.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
RUN = ("python", "sh")
DEFAULT_RUN = "output of the default run"
_NOTE = re.compile(r"<!-- test: (.*) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page (str): name of its page.
        line (int): of its first line of code, from 0.
        language (str): behind the fence.
        note (str): above it; empty where there is none.
        code (str): its content.
    """

    page: str
    line: int
    language: str
    note: str
    code: str

    @property
    def is_full(self) -> bool:
        """Whether make test leaves it out."""
        return self.note.split(",")[0] == "full"


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order; a fence may be longer than three to hold others."""
    found: list[Block] = []
    lines = PAGES[page].read_text().splitlines()
    note, i = "", 0
    while i < len(lines):
        fence = re.fullmatch(r"(`{3,})(\S*)", lines[i])
        if fence is None:
            match = _NOTE.fullmatch(lines[i])
            note = match[1] if match else note if not lines[i] else ""
            i += 1
            continue
        end = next(j for j in range(i + 1, len(lines)) if lines[j] == fence[1])
        found.append(Block(page, i + 1, fence[2], note, "\n".join(lines[i + 1 : end]) + "\n"))
        note, i = "", end + 1
    return found


def noted(note: str) -> list[Block]:
    """The blocks of all pages that have a note."""
    return [block for page in PAGES for block in blocks(page) if block.note == note]


class PageRun:
    """Runs a page's blocks in a folder of its own.

    Args:
        page (str): name of the page.
        folder (Path): an empty folder.
        cache (Path): for prepared data.
    """

    def __init__(self, page: str, folder: Path, cache: Path) -> None:
        self.page = page
        self.folder = folder
        programs, installed = (folder.parent / f"{folder.name}-{name}" for name in ("programs", "installed"))
        programs.mkdir()
        pip = programs / "pip"  # leaves the environment as it is
        pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@" --target {installed}\n')
        pip.chmod(0o755)
        self.environment = {
            **os.environ,
            "MDR_CACHE": str(cache),
            **{"PIP_RETRIES": "10", "PIP_DEFAULT_TIMEOUT": "60"},  # an index may be slow now and then
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(installed)]),
        }
        self.names: dict[str, Any] = {"__name__": page}
        self._groups: list[int] = []  # of processes, by each block of commands
        if "./examples/" in PAGES[page].read_text():
            shutil.copytree(ROOT / "examples", folder / "examples")

    def run(self, with_full: bool) -> dict[str, str]:
        """Runs the blocks in order, and checks the outputs that follow them.

        Returns:
            dict[str, str]: what blocks with notes printed, by note.
        """
        try:
            return self._run(with_full)
        finally:  # servers that a page starts in the background
            for group in self._groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)

    def _run(self, with_full: bool) -> dict[str, str]:
        printed: str | None = None
        by_note: dict[str, str] = {}
        for block in blocks(self.page):
            if block.language in RUN and not block.note.startswith("file "):
                skipped = block.is_full and not with_full
                printed = None if skipped else self._python(block) if block.language == "python" else self._sh(block)
                by_note |= {block.note: printed} if printed is not None else {}
            elif block.note == "output" and printed is not None:
                place = f"{PAGES[self.page].name}, line {block.line + 1}"
                assert printed.strip() == block.code.strip(), f"{place} shows another output"
        return by_note

    def _python(self, block: Block) -> str:
        out = io.StringIO()
        code = compile("\n" * block.line + block.code, str(PAGES[self.page]), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(out), contextlib.chdir(self.folder):
            exec(code, self.names)  # noqa: S102
        return out.getvalue()

    def _sh(self, block: Block) -> str:
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._groups.append(process.pid)
        out, said = process.communicate()
        assert process.returncode == 0, f"{PAGES[self.page].name}, line {block.line + 1}: {said[-2000:]}"
        return out


def assert_shows(block: Block, output: str) -> None:
    """Asserts that a block shows the lines of a run's closing tables; dots stand for lines that are left out.

    Numbers may differ as they do between processors, whose rounding a training carries on until another step is the
    best one: the more, the fewer rows a line is of. Speed may differ by any amount.
    """
    # the domains' header and a line of parameters start with the same word
    lines = {(cells[0], len(cells)): cells for cells in map(_cells, output.splitlines())}
    for line in block.code.splitlines():
        shown = _cells(line)
        if line == "..." or shown[0].startswith("---"):
            continue
        found = lines.get((shown[0], len(shown)))
        assert found is not None, f"the run has no line '{line}'"
        compared = len(shown) - 1 if shown[0] in ("pretrain", "adapt") else len(shown)
        rows, most = shown[-1].replace(",", ""), 0.01 if shown[0] == "calibration" else 0.004
        if rows.isdecimal() and int(rows):
            most *= max(1.0, (30_000 / int(rows)) ** 0.5)
        for mine, other in zip(shown[:compared], found[:compared], strict=True):
            if mine != other:
                numbers = [[float(number) for number in cell.split(" to ")] for cell in (mine, other)]
                near = all(abs(a - b) < most for a, b in zip(*numbers, strict=True))
                assert near, f"'{line}' is '{'  '.join(found)}' in the run"


def _cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())
