"""Notices a process that hangs or is gone, and ends the run with a sentence that names it."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # sysexits.h: a failure for now; the same command goes on
WHAT_THEN = "this rank ends, and the same command with --resume auto goes on from the last checkpoint"
BEAT_SECONDS = 1.0
_GONE_SECONDS = 4 * BEAT_SECONDS  # without a sign of life for so long, a rank is the one whose connections broke
_PAUSE_SECONDS = 0.02
_WORDS = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_VERDICT, _GONE = "watch/verdict", "watch/gone/"


@dataclass
class _Seen:
    """What is known of a rank: its last sign of life, and when it last was new, and got on."""

    said: dict[str, Any]
    alive: float
    moved: float


class Watch:
    """Tells the others that this rank is alive and how far it is, and watches them; by threads of its own.

    Rank 0 watches all, the others watch rank 0. A rank hangs if it is not heard of for :attr:`seconds`, or if no rank
    gets on for so long: then the one that is furthest behind is named. Only between :meth:`begin` and :meth:`end` do
    ranks have to get on; elsewhere, where one of them may prepare data for long, they have to be heard of.

    Args:
        store (Store): of the process group, by a connection that nothing else uses.
        rank (int): this process's.
        world_size (int): number of processes.
        seconds (float): see above; may be set later.
        leave (Callable): ends this process with an exit code, at once.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        seconds: float = 600.0,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank = rank
        self.seconds = seconds
        self.leave = leave
        self._store = store
        self._world_size = world_size
        self._steps, self._works, self._place = 0, False, "at the start"
        now = time.monotonic()
        others = range(world_size) if rank == 0 else (0,)
        self._seen = {other: _Seen({}, now, now) for other in others}
        self._ended = threading.Event()
        self._looked = now
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._watch_the_store)]
        for thread in self._threads:
            thread.start()

    def at(self, place: str) -> None:
        """Takes note of where this rank is: it has got on."""
        self._place = place
        self._steps += 1

    def begin(self) -> None:
        """From here on this rank has to get on."""
        self._works = True
        self._steps += 1

    def end(self) -> None:
        """From here on it need not."""
        self._works = False
        self._steps += 1

    def close(self, reason: str = "has ended") -> None:
        """Ends the watch, and tells the others why this rank is gone."""
        self._ended.set()
        try:
            self._store.set(f"{_GONE}{self.rank}", reason)
        except (RuntimeError, ValueError):
            return  # who kept the store is gone, too

    def wait_for_others(self, seconds: float) -> None:
        """Waits until all others have closed their watches, for so long at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if self._store.check([f"{_GONE}{other}" for other in range(self._world_size) if other != self.rank]):
                    return
            except (RuntimeError, ValueError):
                return
            time.sleep(_PAUSE_SECONDS)

    def who_is_lost(self) -> str:
        """A sentence about the rank whose end has broken this one's connections; takes some seconds."""
        sentence = "a process that belongs to the run is gone"
        until = time.monotonic() + 2 * _GONE_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 2)
            try:
                for other in range(self._world_size):
                    if other != self.rank and self._store.check([f"{_GONE}{other}"]):
                        return f"rank {other} {self._store.get(f'{_GONE}{other}').decode()}"
                if self._store.check([_VERDICT]):
                    return self._store.get(_VERDICT).decode()
                silent = self._silent(_GONE_SECONDS)
                if silent:
                    sentence = f"rank {silent[0]}{self._where(silent[0])} is gone"
                    self._store.set(_VERDICT, sentence)
                    return sentence
            except (RuntimeError, ValueError):
                return "the process that joins the ranks is gone"
        return sentence

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                sentence = self._look()
            except (RuntimeError, ValueError) as error:  # if it lasts, the store's own watch tells
                logger.info("the process that joins the ranks did not answer: %s", error)
                continue
            self._looked = time.monotonic()
            if sentence is not None:
                self._leave(sentence)

    def _watch_the_store(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if time.monotonic() - self._looked > self.seconds + 2 * BEAT_SECONDS:
                agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                who = "torchrun's agent, which joins the ranks," if agent else f"rank 0{self._where(0)}"
                self._leave(f"{who} has not answered for {self.seconds:.0f} seconds")

    def _leave(self, sentence: str) -> None:
        if not self._ended.is_set():
            self._ended.set()
            print(f"error: {sentence}; {WHAT_THEN}", file=sys.stderr, flush=True)
            self.leave(EXIT_CODE)

    def _look(self) -> str | None:
        """Sends a sign of life and looks at the others'; a sentence where one of them hangs."""
        own = {"steps": self._steps, "works": self._works, "place": self._place, "host": socket.gethostname()}
        self._store.set(f"watch/{self.rank}", json.dumps({**own, "beat": time.time()}))
        self._listen(other for other, seen in self._seen.items() if seen.said or self._store.check([f"watch/{other}"]))
        if self.rank and self._store.check([_VERDICT]):
            return self._store.get(_VERDICT).decode()
        silent = self._silent(self.seconds)
        if silent:
            sentence = f"rank {silent[0]}{self._where(silent[0])} has not been heard of for {self.seconds:.0f} seconds"
        elif self.rank == 0 and self._are_stuck():
            last = min(self._seen, key=lambda other: self._seen[other].said["steps"])
            sentence = f"rank {last}{self._where(last)} has not got on for {self.seconds:.0f} seconds"
        else:
            return None
        if self.rank == 0:
            self._store.set(_VERDICT, sentence)
        return sentence

    def _are_stuck(self) -> bool:
        """Whether all ranks have to get on, and none has for too long."""
        now = time.monotonic()
        return all(seen.said.get("works") and now - seen.moved > self.seconds for seen in self._seen.values())

    def _listen(self, others: Iterable[int]) -> None:
        now, ranks = time.monotonic(), list(others)
        for other, text in zip(ranks, self._store.multi_get([f"watch/{other}" for other in ranks]), strict=True):
            said, seen = json.loads(text), self._seen[other]
            if said["beat"] != seen.said.get("beat"):
                seen.alive = now
            if said["steps"] != seen.said.get("steps"):
                seen.moved = now
            seen.said = said

    def _silent(self, seconds: float) -> list[int]:
        """Ranks not heard of for so long; those that have said good-bye are none of them."""
        late = [other for other, seen in self._seen.items() if time.monotonic() - seen.alive > seconds]
        return [other for other in late if not self._store.check([f"{_GONE}{other}"])]

    def _where(self, rank: int) -> str:
        said = self._seen[rank].said
        return f" ({said['place']}, on {said['host']})" if said else ""


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, says that another rank does not answer."""
    while error is not None:
        if isinstance(error, CheckpointException):
            return any(is_broken_connection(one) for one, _ in error.failures.values())
        words = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in words for w in _WORDS)):
            return True
        error = error.__cause__
    return False


def separate_store() -> dist.Store:
    """The group's store by a connection of its own, so that one that waits does not hold up the other."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
