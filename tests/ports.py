"""A port that stays free for the process that is told it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port that the system gives to nobody while this is open; who names it may listen there.

    One that is looked up and let go may be another's by the time that a process which starts for seconds binds it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: then both may have it
        held.bind(("", 0))
        yield int(held.getsockname()[1])
