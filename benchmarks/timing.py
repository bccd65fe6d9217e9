"""Times variants of a computation against each other, interleaved in one run."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """How two variants compare: the median over the rounds, and the lowest and highest of them."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def single(value: float) -> Ratio:
        """Of what is measured once."""
        return Ratio(value, value, value)


@dataclass(frozen=True)
class Timings:
    """What the rounds took.

    Args:
        seconds (dict[str, list[float]]): of one call, by variant and round; slow variants may have fewer rounds.

    Example::

        >>> Timings({"fast": [1.0, 1.0, 2.0], "slow": [3.0, 2.0, 2.0]}).ratio("slow", "fast")
        Ratio(median=2.0, lowest=1.0, highest=3.0)
    """

    seconds: dict[str, list[float]]

    def ratio(self, variant: str, reference: str) -> Ratio:
        """Time of a variant over that of another in the same round: below 1 where the variant is quicker."""
        pairs = zip(self.seconds[variant], self.seconds[reference], strict=False)
        ratios = [own / other for own, other in pairs]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def speed(self, variant: str, reference: str) -> Ratio:
        """How many times as fast as another a variant is, for the same rows: above 1 where it is quicker."""
        return self.ratio(reference, variant)

    def milliseconds(self, variant: str) -> float:
        """Median of one call, on this machine and at this moment: context, not a result."""
        return 1e3 * statistics.median(self.seconds[variant])


def device() -> torch.device:
    """The device that benchmarks run on: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    least_seconds: float = 0.0,
    most_seconds: float = math.inf,
) -> Timings:
    """Runs A B C A B C ..., so that all variants meet the same state of the machine.

    Args:
        variants (Mapping[str, Callable]): what is timed, by name; each call does the same work.
        rounds (int): calls of each variant that are timed.
        warmup (int): calls of each before that, at least 1.
        least_seconds (float): a timed call is repeated until it takes about this long, so that the clock can tell.
        most_seconds (float): a variant that would take longer than this in all has fewer rounds, at least three.

    Returns:
        Timings: seconds of one call.

    Example::

        >>> timings = interleave({"sum": lambda: sum(range(100)), "max": lambda: max(range(100))}, rounds=5)
        >>> {name: len(seconds) for name, seconds in timings.seconds.items()}
        {'sum': 5, 'max': 5}
    """
    gc.collect()
    gc.disable()  # or it would strike in one variant and not in another
    try:
        return _run(variants, rounds, max(warmup, 1), least_seconds, most_seconds)
    finally:
        gc.enable()


def _run(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int, least_seconds: float, most_seconds: float
) -> Timings:
    warm = {name: max(min(_time(variant, 1) for _ in range(warmup)), 1e-9) for name, variant in variants.items()}
    repeats = {name: max(1, math.ceil(least_seconds / once)) for name, once in warm.items()}
    affordable = {name: most_seconds / (repeats[name] * once) for name, once in warm.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, variant in variants.items():
            if number < max(LEAST_ROUNDS, affordable[name]):
                seconds[name].append(_time(variant, repeats[name]))
    return Timings(seconds)


def _time(variant: Callable[[], object], repeats: int) -> float:
    """Seconds of one call."""
    _synchronise()
    started = time.perf_counter()
    for _ in range(repeats):
        variant()
    _synchronise()
    return (time.perf_counter() - started) / repeats


def _synchronise() -> None:
    """Waits for what an accelerator has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
