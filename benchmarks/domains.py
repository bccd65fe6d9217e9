"""Step time, peak memory and checkpoint size of adapters by the number of domains."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from benchmarks.report import Goal, Line, Report, quiet, run
from benchmarks.timing import Ratio, interleave
from benchmarks.workload import build_runtime, click_schema, random_batches, training
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.methods.stage import adapt_stage
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.stage_runtime import StageRuntime

REFERENCE = 10  # domains
STEP_GOALS = {("dlrm", 1000): Goal("<=", 1.5)}
Measure = Literal["memory", "time", "checkpoint", "adam"]
ONCE = "values and moments read and written once"


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        backbones: keys of BACKBONES.
        domains: numbers of domains; 10, which all are held against, comes in any case.
        measures: peak memory takes a process for each number of domains; `adam` says how near the banks' optimizer is
            to the memory traffic that it cannot do without.
        rows: embedding rows of all tables together.
        dim: width of the tables.
        num_sparse: tables.
        num_dense: dense features.
        hidden: widths of the MLP part's hidden layers.
        batch_size: rows.
        batches: steps of a round.
        rounds: of each number of domains.
    """

    backbones: tuple[str, ...] = ("dlrm", "mlp")
    domains: tuple[int, ...] = (2, 10, 100, 1000, 10_000)
    measures: tuple[Measure, ...] = ("memory", "time", "checkpoint", "adam")
    rows: int = 10_000_000
    dim: int = 16
    num_sparse: int = 26
    num_dense: int = 13
    hidden: tuple[int, ...] = (256, 128)
    batch_size: int = 4096
    batches: int = 5
    rounds: int = 10


def measure(options: Options) -> Report:
    """Compares MLoRA's adapt stage over numbers of domains: time of a step, peak memory, size of the checkpoint.

    Memory is that of a whole process which builds the model and trains a round; on a GPU, what it holds there.
    """
    unknown = [name for name in options.backbones if name not in BACKBONES]
    if unknown:
        raise ValueError(f"there is no backbone '{unknown[0]}'; choose from {', '.join(BACKBONES)}")
    report = Report("domains", "step time, peak memory, checkpoint size", options)
    sizes = sorted({*options.domains, REFERENCE})
    # before this process grows: a child's peak starts from its parent's size
    if "memory" in options.measures:
        for backbone in options.backbones:
            peaks = {
                size: _in_subprocess(options, backbone, size)
                for size in tqdm(sizes, f"memory, {backbone}", disable=None)
            }
            _add_bytes(report, backbone, "peak memory", peaks)
    if {"time", "checkpoint", "adam"} & set(options.measures):
        with process_group() as environment:
            for backbone in options.backbones:
                _measure_runs(report, options, backbone, sizes, environment)
                gc.collect()  # sharded models hold themselves in cycles, and their tables are large
    return report


def peak_memory(options: Options, backbone: str, num_domains: int) -> int:
    """Bytes that this process has held at most, once it has trained a round with so many domains."""
    with quiet(), process_group() as environment:
        runtime, batches = _adapt_stage(options, backbone, num_domains, environment)
        training(runtime, batches)()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _in_subprocess(options: Options, backbone: str, num_domains: int) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, options, backbone, num_domains).result()


def _adapt_stage(
    options: Options, backbone: str, num_domains: int, environment: Environment
) -> tuple[StageRuntime, list[DomainBatch]]:
    divisions = (Division("scenario", num_domains),)
    schema = click_schema(options.rows, options.num_sparse, options.num_dense, divisions)
    model = BACKBONES[backbone](hidden=options.hidden).build(schema, options.dim)
    runtime = build_runtime(model, MLoRA(), divisions, adapt_stage(), "rowwise_adagrad", options.dim, environment)
    return runtime, random_batches(schema, options.batch_size, options.batches)


def _measure_runs(report: Report, options: Options, backbone: str, sizes: list[int], environment: Environment) -> None:
    stages = {size: _adapt_stage(options, backbone, size, environment) for size in sizes}
    if "time" in options.measures:
        runs = {str(size): training(runtime, batches) for size, (runtime, batches) in stages.items()}
        timings = interleave(runs, options.rounds)
        for size in sizes:
            if size != REFERENCE:
                ratio = timings.ratio(str(size), str(REFERENCE))
                context = {"ms": timings.milliseconds(str(size)) / options.batches}
                report.add(_line(backbone, "step time", size, ratio, STEP_GOALS.get((backbone, size)), context))
    if "adam" in options.measures:
        for size, (runtime, batches) in stages.items():
            ratio, context = _adam_against_memory(runtime, batches, options.rounds)
            report.add(Line({"backbone": backbone, "measure": "adam"}, f"{size} domains", ONCE, ratio, None, context))
    if "checkpoint" in options.measures:
        written = {size: _checkpoint_size(runtime) for size, (runtime, _) in stages.items()}
        _add_bytes(report, backbone, "checkpoint", written)


def _adam_against_memory(
    runtime: StageRuntime, batches: list[DomainBatch], rounds: int
) -> tuple[Ratio, dict[str, float]]:
    """Time of the banks' Adam inside training steps, over that of touching all it keeps once; and milliseconds."""
    banks = runtime.stage_optimizer.by_name["banks"]
    step, train, adam, bare = banks.step, training(runtime, batches), [], []

    def timed(closure: None = None) -> None:
        started = time.perf_counter()
        step()
        adam.append(time.perf_counter() - started)

    train()
    kept = [tensor for param, state in banks.state.items() for tensor in (param.detach(), *state.values())]
    banks.step = timed  # type: ignore[method-assign, assignment]
    for _ in range(rounds):
        train()
        for _ in batches:
            started = time.perf_counter()
            for tensor in kept:
                tensor.mul_(1.0)
            bare.append(time.perf_counter() - started)
    ratios = sorted(own / other for own, other in zip(adam, bare, strict=True))
    return Ratio(statistics.median(ratios), ratios[0], ratios[-1]), {"ms": 1e3 * statistics.median(adam)}


def _checkpoint_size(runtime: StageRuntime) -> int:
    """Bytes of the checkpoint that the trainer writes of a finished stage."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stage")
        checkpoint.save(path, runtime.state(frozenset(ParameterGroup)), {})
        return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))


def _add_bytes(report: Report, backbone: str, what: str, sizes: dict[int, int]) -> None:
    for size, number in sizes.items():
        if size != REFERENCE:
            ratio = Ratio.single(number / sizes[REFERENCE])
            report.add(_line(backbone, what, size, ratio, None, {"MB": number / 1e6}))


def _line(backbone: str, what: str, size: int, ratio: Ratio, goal: Goal | None, context: dict[str, float]) -> Line:
    return Line(
        {"backbone": backbone, "measure": what}, f"{size} domains", f"{REFERENCE} domains", ratio, goal, context
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("domains", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
