"""What the commands share: bad input ends with one sentence, and output with whatever characters can be shown."""

from __future__ import annotations

import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from jsonargparse import ArgumentParser


class _Main(Protocol):
    def __call__(self, args: Sequence[str] | None = None) -> int: ...


class SentenceParser(ArgumentParser):
    """Says what is wrong in one sentence, without the list of all options that --help gives.

    Options are written out: an abbreviation that is unique today may not be so tomorrow.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(exit_on_error=True, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError."""
        before, missing, named = message.partition("arguments are required: ")
        if missing:  # by the names that the command line has
            options = _option_names(self)
            message = before + missing + ", ".join(options.get(name, name) for name in named.split(", "))
        raise ValueError(f"{' '.join(message.split())} (all options: --help)")


def _option_names(parser: ArgumentParser, prefix: str = "") -> dict[str, str]:
    """What the command line calls each value of a parser and of its subcommands, by its name in the parser."""
    names = {}
    for action in parser._actions:
        names[prefix + action.dest] = action.option_strings[0] if action.option_strings else action.dest
        for name, child in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
            if isinstance(child, ArgumentParser):
                names |= _option_names(child, f"{prefix}{name}.")
    return names


def fail_with_sentence(main: Callable[[Sequence[str] | None], int]) -> _Main:
    """Makes a command end with one sentence on stderr and exit code 2 where its input is bad.

    Any other error is a mistake of the program, and keeps its traceback.
    """

    @functools.wraps(main)
    def run(args: Sequence[str] | None = None) -> int:
        with _replacing_characters():
            try:
                return main(args)
            except (ValueError, OSError) as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2

    return run


def missing_library(error: ImportError) -> ValueError:
    """What to raise where rows cannot be read, since polars is not installed."""
    return ValueError(f"rows are read by a library that is missing ({error}); install it: pip install '.[data]'")


@contextmanager
def _replacing_characters() -> Iterator[None]:
    """Shows what stdout's encoding lacks, letters of a domain's name say, as question marks, and not as an error."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides other packages' notes to their own developers for a while; the caller's log handlers stay as they are."""
    levels = dict.fromkeys(("", "torch", "torchrec"), logging.ERROR) | {"torchrec_mdr": logging.INFO}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
