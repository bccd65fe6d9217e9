"""What a GPU allows: an adapted layer against its floor, and the adapt stage against full fine-tuning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import stages
from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import Timings
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.ops.groups import DomainGroups

IN, OUT, RANK = 1024, 512, 16
BYTES_PER_SECOND = 3e12  # of an H100's memory
FLOPS = {"tf32": 400e12, "bf16": 800e12}
OF_FLOOR = 1.5  # what is wanted
LEAST_SECONDS, LEAST_CALLS = 2e-3, 20  # of a replay, whose start takes some microseconds
Precision = Literal["tf32", "bf16"]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        domains: numbers of domains.
        batch_sizes: rows.
        precisions: of products; weights and rows are float32 in `tf32` and bfloat16 in `bf16`.
        rounds: of each variant.
        stages: measure the adapt stage, too.
    """

    domains: tuple[int, ...] = (3, 20, 300, 1000, 10_000)
    batch_sizes: tuple[int, ...] = (4096, 65_536)
    precisions: tuple[Precision, ...] = ("tf32", "bf16")
    rounds: int = 20
    stages: bool = True


def floors(num_rows: int, present: int, precision: Precision) -> dict[str, float]:
    """The time of an adapted frozen layer over the layer's alone, forward and backward, in one pass over all it reads.

    Either memory or tensor cores are busy throughout.

    Args:
        num_rows (int): B.
        present (int): adapters that have rows.
        precision (Precision): of products.

    Example::

        >>> {name: round(value, 2) for name, value in floors(4096, 983, "tf32").items()}
        {'forward': 3.91, 'backward': 7.49}
        >>> {name: round(value, 2) for name, value in floors(65_536, 3, "tf32").items()}
        {'forward': 1.05, 'backward': 1.31}
    """
    size, flops = 4 if precision == "tf32" else 2, FLOPS[precision]
    rows, layer, table = num_rows * (IN + OUT), IN * OUT, RANK * (IN + OUT) + OUT

    def seconds(numbers: int, products: int) -> float:
        return max(numbers * size / BYTES_PER_SECOND, 2 * products / flops)

    alone = seconds(rows + layer, num_rows * layer)
    adapter = num_rows * RANK * (IN + OUT)
    forward = seconds(rows + layer + present * table, num_rows * layer + adapter)
    backward = seconds(rows + num_rows * IN + layer + 2 * present * table, num_rows * layer + 2 * adapter)
    return {"forward": forward / alone, "backward": backward / alone}


class Layers:
    """A frozen layer alone and with adapters, on rows in the loader's order; calls to time on the current stream.

    Args:
        num_rows (int): B.
        num_domains (int): N.
        dtype (torch.dtype): of everything.
    """

    def __init__(self, num_rows: int, num_domains: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            bank = LoRABank(num_domains, IN, OUT, RANK).to(dtype)
            nn.init.normal_(bank.lora_B)
            self.linear = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
            self.x = torch.randn(num_rows, IN, dtype=dtype, requires_grad=True)
            self.gradient = torch.randn(num_rows, OUT, dtype=dtype)
            ids = torch.randint(num_domains, (num_rows,)).sort().values
            self.groups = DomainGroups.from_sorted_ids(ids, num_domains)
        self.present = int(ids.unique().numel())
        self.layer = AdapterLinear.from_linear(self.linear, bank)
        self.weights = list(bank.parameters())

    def forward(self) -> dict[str, Callable[[], object]]:
        """What is timed forward."""
        calls = {"linear": lambda: self.linear(self.x), "adapted": lambda: self.layer.adapted(self.x, self.groups)}
        return {name: torch.no_grad()(call) for name, call in calls.items()}

    def backward(self) -> dict[str, Callable[[], object]]:
        """What is timed backward: the gradients of x and of what trains."""
        outputs: dict[str, Tensor] = {"linear": self.linear(self.x), "adapted": self.layer.adapted(self.x, self.groups)}
        wanted = {"linear": [self.x], "adapted": [self.x, *self.weights]}
        return {
            name: partial(torch.autograd.grad, y, wanted[name], self.gradient, retain_graph=True)
            for name, y in outputs.items()
        }


def replay(make: Callable[[], Mapping[str, Callable[[], object]]], rounds: int) -> Timings:
    """Times calls in GPU time, interleaved: each is captured as a graph, many times in a row, and replayed.

    Args:
        make (Callable): gives the calls, by name, on the stream that they are captured on.
        rounds (int): replays of each.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    with torch.cuda.stream(stream):
        for name, call in make().items():
            for _ in range(3):
                call()
            repeats = max(LEAST_CALLS, round(LEAST_SECONDS / _seconds(call)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(repeats):
                    call()
            graph.replay()
            graphs[name] = graph, repeats
        seconds: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, (graph, repeats) in graphs.items():
                seconds[name].append(_seconds(graph.replay) / repeats)
    torch.cuda.current_stream().wait_stream(stream)
    return Timings(seconds)


def _seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def measure(options: Options) -> Report:
    """Times a frozen layer of 1024 -> 512 with adapters of rank 16 against the layer alone, in GPU time.

    The goal is 1.5 times the floor, which is what an H100's memory and tensor cores allow in one pass. Then the adapt
    stage of mlora against full fine-tuning, in rows per second and in TF32.
    """
    report = Report("gpu", "GPU time of layers, rows per second of stages", options)
    if not torch.cuda.is_available():
        report.note("Nothing is measured: there is no GPU.")
        return report
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        cases = list(product(options.precisions, options.batch_sizes, options.domains))
        for precision, num_rows, num_domains in tqdm(cases, desc="gpu", unit="case", disable=None):
            _measure_layer(report, options, precision, num_rows, num_domains)
        if options.stages:
            _measure_stages(report, options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return report


def _measure_layer(report: Report, options: Options, precision: Precision, num_rows: int, num_domains: int) -> None:
    layers = Layers(num_rows, num_domains, torch.float32 if precision == "tf32" else torch.bfloat16)
    floor = floors(num_rows, layers.present, precision)
    for name, calls in (("forward", layers.forward), ("backward", layers.backward)):
        timings = replay(calls, options.rounds)
        ratio = timings.ratio("adapted", "linear")
        of_floor = ratio.median / floor[name]
        microseconds = {f"us {variant}": 1e3 * timings.milliseconds(variant) for variant in ("adapted", "linear")}
        case = _case(f"{IN}->{OUT} r{RANK}", precision, num_rows, num_domains, name)
        context = {**microseconds, "floor": floor[name], "of floor": of_floor}
        report.add(Line(case, "adapted", "linear", ratio, Goal("<=", OF_FLOOR * floor[name]), context))


def _measure_stages(report: Report, options: Options) -> None:
    own = stages.Options(methods=("mlora",), rows=1_000_000, rounds=options.rounds)
    for line in stages.measure(own).lines:
        if line.variant == "adapt" and line.against == stages.FULL:
            case = _case(f"{line.case['backbone']}, mlora", "tf32", own.batch_size, own.domains, "step")
            report.add(replace(line, case=case))


def _case(what: str, precision: str, num_rows: int, num_domains: int, which: str) -> dict[str, str | int]:
    return {"what": what, "precision": precision, "batch": num_rows, "domains": num_domains, "pass": which}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("gpu", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
