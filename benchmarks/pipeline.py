"""The sharded pipeline with its loader, against a plain PyTorch loop of the same model on the same data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from benchmarks.plain import PlainBatch, PlainMLP, plain_step
from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import build_runtime
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.methods.stage import pretrain_stage
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.prepare import prepare
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.stage_runtime import StageRuntime

GOALS = {("pipeline", "plain PyTorch"): Goal(">=", 0.8), ("evaluation", "pipeline"): Goal(">=", 1.0)}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        rows: of the synthetic data set, 80 % of them for training; a round is an epoch.
        num_embeddings: ids of its largest sparse feature.
        dim: width of the tables.
        hidden: widths of the hidden layers.
        batch_size: rows.
        eval_batch_size: rows of an evaluation step.
        rounds: of each variant.
    """

    rows: int = 250_000
    num_embeddings: int = 10_000
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128)
    batch_size: int = 4096
    eval_batch_size: int = 16_384
    rounds: int = 10


def measure(options: Options) -> Report:
    """Times epochs of pretraining `mlp` with Adam: loader and sharded pipeline, against PyTorch with rows in tensors.

    Both read rows from memory, shuffle them and gather each batch. `evaluation` scores the same rows, AUC per domain
    included.
    """
    report = Report("pipeline", "rows per second", options)
    folder = prepare("synthetic", rows=options.rows, num_embeddings=options.num_embeddings)
    schema = Schema.load(folder)
    division = schema.divisions[0]
    loader = DomainLoader(folder, schema, "train", [division.name], options.batch_size, shuffle=True)
    in_order = DomainLoader(folder, schema, "train", [division.name], options.eval_batch_size)
    with process_group() as environment:
        backbone = BACKBONES["mlp"](hidden=options.hidden).build(schema, options.dim)
        runtime = build_runtime(backbone, MLoRA(), (division,), pretrain_stage(), "adam", options.dim, environment)
        timings = interleave(
            {
                "pipeline": _train(runtime, loader),
                "plain PyTorch": _train_plain(options, schema, folder, loader.num_batches, environment),
                "evaluation": _evaluate(runtime, in_order, division.domain_names),
            },
            options.rounds,
        )
    for (variant, reference), goal in GOALS.items():
        case: dict[str, str | int] = {"rows": loader.num_rows, "batch": options.batch_size}
        context = {"krows/s": loader.num_rows / timings.milliseconds(variant)}
        report.add(Line(case, variant, reference, timings.speed(variant, reference), goal, context))
    return report


def _train(runtime: StageRuntime, loader: DomainLoader) -> Callable[[], None]:
    epochs = count()

    def epoch() -> None:
        for _ in runtime.train(loader.batches(next(epochs))):
            pass

    return epoch


def _evaluate(runtime: StageRuntime, loader: DomainLoader, domain_names: Sequence[str]) -> Callable[[], None]:
    def evaluate() -> None:
        metrics = DomainMetrics(domain_names)
        with runtime.model.routed(Route.DOMAIN):
            for output in runtime.evaluate(loader.batches(0)):
                metrics.update(output.logits, output.labels, output.domain_ids[:, 0])
        metrics.compute()

    return evaluate


def _train_plain(
    options: Options, schema: Schema, folder: str, num_batches: int, environment: Environment
) -> Callable[[], None]:
    division = schema.divisions[0].name
    (everything,) = DomainLoader(folder, schema, "train", [division], schema.rows["train"]).batches(0)
    rows = PlainBatch.of(everything)
    step = plain_step(PlainMLP(schema, options.dim, options.hidden).to(environment.device))

    def epoch() -> None:
        for index in torch.randperm(len(rows.labels)).tensor_split(num_batches):
            step(rows.take(index).to(environment.device))

    return epoch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("pipeline", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
