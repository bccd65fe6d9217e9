"""What a benchmark prints and writes: ratios, each against a named alternative of the same run."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

from benchmarks.timing import Ratio
from torchrec_mdr.distributed.environment import keep_freed_memory

OptionsT = TypeVar("OptionsT")


class Goal(NamedTuple):
    """What a ratio should be."""

    relation: Literal["<=", ">="]
    bound: float

    def is_met(self, ratio: float) -> bool:
        """Whether a ratio is."""
        return ratio <= self.bound if self.relation == "<=" else ratio >= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:.2f}"


@dataclass(frozen=True)
class Line:
    """One comparison.

    Args:
        case (Mapping[str, str | int]): what was measured; columns of their own, the same in all lines of a report.
        variant (str): what is compared.
        against (str): the alternative.
        ratio (Ratio): variant over alternative.
        goal (Goal | None): what the median should be.
        context (Mapping[str, float]): absolute figures of this machine and moment.
    """

    case: Mapping[str, str | int]
    variant: str
    against: str
    ratio: Ratio
    goal: Goal | None = None
    context: Mapping[str, float] = field(default_factory=dict)


class Report:
    """The lines of a benchmark.

    Args:
        name (str): of the benchmark.
        quantity (str): what the ratios are of.
        options (object): a dataclass.

    Example::

        >>> report = Report("demo", "time", options=None)
        >>> report.add(Line({"rank": 8}, "adapted", "linear", Ratio(1.1, 1.0, 1.25), Goal("<=", 1.15), {"ms": 3.14}))
        >>> print(report.table())
        rank    variant    against      ratio    min    max     goal    met    ms
        ------  ---------  ---------  -------  -----  -----  -------  -----  ----
        8       adapted    linear       1.100  1.000  1.250  <= 1.15    yes   3.1
    """

    def __init__(self, name: str, quantity: str, options: object) -> None:
        self.name = name
        self.quantity = quantity
        self.options = options
        self.lines: list[Line] = []
        self.notes: list[str] = []

    def add(self, line: Line) -> None:
        """Adds a comparison."""
        self.lines.append(line)

    def note(self, sentence: str) -> None:
        """Adds a sentence below the table."""
        self.notes.append(sentence)

    def table(self) -> str:
        """All lines, as text."""
        rows = [_row(line) for line in self.lines]
        left = len(self.lines[0].case) + 2 if rows else 0
        width = max((len(row) for row in rows), default=0)
        colalign = ["left"] * left + ["right"] * (width - left)
        return tabulate(rows, headers="keys", disable_numparse=True, missingval="-", colalign=colalign)

    def finish(self, path: str | None) -> None:
        """Prints the report and, where a path is given, writes it as JSON."""
        machine = environment()
        print(f"{self.name}: {self.quantity}, variant over the one it is held against; median over the rounds")
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        print(self.table())
        for sentence in self.notes:
            print(sentence)
        if path is not None:
            content = {
                "benchmark": self.name,
                "quantity": self.quantity,
                "environment": machine,
                "options": vars(self.options),
                "lines": [asdict(line) | {"goal": str(line.goal) if line.goal else None} for line in self.lines],
                "notes": self.notes,
            }
            with open(path, "w") as file:
                json.dump(content, file, indent=2)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what torch and torchrec say to their own developers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def environment() -> dict[str, str | int]:
    """The machine, as far as ratios depend on it."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def run(
    name: str, benchmark: Callable[[OptionsT], Report], options: type[OptionsT], arguments: Sequence[str] | None
) -> int:
    """Reads the command line, runs a benchmark and reports.

    Args:
        name (str): of the benchmark's module.
        benchmark (Callable): takes the options, returns the report; its docstring is what --help says.
        options (type): a dataclass; its boolean options are flags.
        arguments (Sequence[str] | None): of the command line; None takes the process's.

    Returns:
        int: exit code, 2 where an option or a file is wrong.
    """
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=benchmark.__doc__)
    parser.add_argument("--json", type=str | None, help="write the report to this file, too")
    parser.add_class_arguments(options, as_group=False)
    flags = {f"--{option.name}" for option in fields(options) if option.default is False}  # type: ignore[arg-type]
    given = sys.argv[1:] if arguments is None else arguments
    values = vars(parser.parse_args([f"{argument}=true" if argument in flags else argument for argument in given]))
    path = values.pop("json")
    keep_freed_memory()  # as training does, whatever is measured
    try:
        with quiet():
            report = benchmark(options(**values))
        report.finish(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _row(line: Line) -> dict[str, Any]:
    met = None if line.goal is None else "yes" if line.goal.is_met(line.ratio.median) else "no"
    return {
        **{name: str(value) for name, value in line.case.items()},
        "variant": line.variant,
        "against": line.against,
        "ratio": f"{line.ratio.median:.3f}",
        "min": f"{line.ratio.lowest:.3f}",
        "max": f"{line.ratio.highest:.3f}",
        "goal": str(line.goal) if line.goal else None,
        "met": met,
        **{name: f"{value:,.1f}" for name, value in line.context.items()},
    }
