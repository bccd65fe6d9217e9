"""How our kernels for GPUs cut their work: the sizes of :mod:`torchrec_mdr.ops.triton.sizes` against others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu import Layers, Precision, replay
from benchmarks.report import Line, Report, run

# by the name of what decides: values to try in its place
OTHERS: dict[str, tuple[Any, ...]] = {
    "rows_of_tile": (16, 32, 64, 128),
    "rows_of_sum": (128, 256, 512, 1024),
    "takes_layer": (False, True),
    "LAYER_ROWS": (64, 128),
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        domains: numbers of domains.
        batch_sizes: rows.
        precisions: of products.
        rounds: of each variant.
    """

    domains: tuple[int, ...] = (3, 20, 300, 1000)
    batch_sizes: tuple[int, ...] = (4096, 65_536)
    precisions: tuple[Precision, ...] = ("tf32", "bf16")
    rounds: int = 5


def measure(options: Options) -> Report:
    """Times the layer of `benchmarks.gpu`, its work cut in other ways, against the way that the kernels choose."""
    report = Report("gpu_sizes", "GPU time", options)
    if not torch.cuda.is_available():
        report.note("Nothing is measured: there is no GPU.")
        return report
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    cases = list(product(options.precisions, options.batch_sizes, options.domains))
    for precision, num_rows, num_domains in tqdm(cases, desc="gpu_sizes", unit="case", disable=None):
        layers = Layers(num_rows, num_domains, torch.float32 if precision == "tf32" else torch.bfloat16)
        for which, calls in (("forward", layers.forward), ("backward", layers.backward)):
            timings = replay(partial(_cut_in_all_ways, calls), options.rounds)
            case: dict[str, str | int] = {
                "precision": precision,
                "batch": num_rows,
                "domains": num_domains,
                "pass": which,
            }
            for variant in timings.seconds:
                if variant != "chosen":
                    context = {"us": 1e3 * timings.milliseconds(variant)}
                    report.add(Line(case, variant, "chosen", timings.ratio(variant, "chosen"), context=context))
    return report


def _cut_in_all_ways(calls: Callable[[], dict[str, Callable[[], object]]]) -> dict[str, Callable[[], object]]:
    call = calls()["adapted"]
    ways = {f"{name} {value}": (name, value) for name, values in OTHERS.items() for value in values}
    return {"chosen": call, **{way: partial(_cut, call, *chosen) for way, chosen in ways.items()}}


def _cut(call: Callable[[], object], name: str, value: Any) -> None:
    with _size(name, value):
        call()


@contextmanager
def _size(name: str, value: Any) -> Iterator[None]:
    from torchrec_mdr.ops.triton import sizes

    chosen = getattr(sizes, name)
    setattr(sizes, name, (lambda *given: value) if callable(chosen) else value)
    try:
        yield
    finally:
        setattr(sizes, name, chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("gpu_sizes", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
