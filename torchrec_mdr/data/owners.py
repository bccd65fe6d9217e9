"""Which process writes a folder, and whether it still can."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any


def this_process() -> dict[str, Any]:
    """Names this process among all of a cluster: host, process id, when it started, and where ids mean the same."""
    return {"host": socket.gethostname(), "space": _space(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_dead(process: Mapping[str, Any]) -> bool:
    """Whether a process is surely no more: it was on this machine, and is not there.

    Args:
        process (Mapping): what :func:`this_process` said there.

    Example::

        >>> is_dead(this_process()), is_dead({**this_process(), "started": "0"}), is_dead({"host": "elsewhere"})
        (False, True, False)
    """
    pid = process.get("pid")
    here = isinstance(pid, int) and _space() != "" and process.get("space") == _space()
    return here and _started(int(str(pid))) != process.get("started")


def _space() -> str:
    """Where process ids mean the same: this boot of this machine, and in it this container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in ticks; None where there is none, or only its remains."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
