"""What the commands share: bad input ends with one sentence, and output with whatever characters can be shown."""

from __future__ import annotations

import functools
import io
import sys
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
        raise ValueError(f"{' '.join(message.split())} (all options: --help)")


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
