"""Samples per second of every stage of a method, against pretraining and against training all parameters."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import (
    build_runtime,
    click_schema,
    floor_of_adapting,
    random_batches,
    training,
    with_divisions,
)
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.registry import BACKBONES, METHODS

PRETRAIN, FULL, FLOOR = "pretrain", "full fine-tuning", "floor"
ADAPT_GOALS = {"dlrm": Goal(">=", 1.5), "mlp": Goal(">=", 1.2)}  # against full fine-tuning
COMBINE_GOAL = Goal(">=", 1.0)  # fuse and gate
FLOOR_GOALS = {"dlrm": Goal(">=", 1 / 1.15), "mlp": Goal(">=", 1 / 1.25)}  # of mlora's adapt stage


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        backbones: keys of BACKBONES.
        methods: methods that pretrain first.
        rows: embedding rows of all tables together.
        dim: width of the tables.
        num_sparse: tables.
        num_dense: dense features.
        domains: of the natural division.
        auxiliary_domains: of the auxiliary division, for multilora.
        hidden: widths of the MLP part's hidden layers.
        experts_per_domain: of moe_mlora.
        batch_size: rows.
        batches: steps of a round; every stage has the same batches.
        rounds: of each stage.
    """

    backbones: tuple[str, ...] = ("dlrm", "mlp")
    methods: tuple[Literal["mlora", "single_lora", "multilora", "moe_mlora"], ...] = ("mlora", "multilora", "moe_mlora")
    rows: int = 10_000_000
    dim: int = 16
    num_sparse: int = 26
    num_dense: int = 13
    domains: int = 20
    auxiliary_domains: int = 3
    hidden: tuple[int, ...] = (256, 128)
    experts_per_domain: int = 1
    batch_size: int = 4096
    batches: int = 5
    rounds: int = 10


def measure(options: Options) -> Report:
    """Times every stage of methods on the same batches, in the sharded pipeline, as the trainer runs it.

    `pretrain` trains embeddings and backbone without adapters; `full fine-tuning` all parameters of the adapted model.
    `floor` trains nothing: the model without adapters runs forward, and backward down to the first adapted layer.
    Embeddings train with row-wise Adagrad.
    """
    unknown = [name for name in options.backbones if name not in BACKBONES]
    if unknown:
        raise ValueError(f"there is no backbone '{unknown[0]}'; choose from {', '.join(BACKBONES)}")
    report = Report("stages", "samples per second", options)
    divisions = (Division("scenario", options.domains), Division("segment", options.auxiliary_domains))
    schema = click_schema(options.rows, options.num_sparse, options.num_dense, divisions)
    batches = random_batches(schema, options.batch_size, options.batches)
    cases = [(backbone, method) for backbone in options.backbones for method in options.methods]
    with process_group() as environment:
        for backbone, method in tqdm(cases, desc="stages", unit="method", disable=None):
            _measure_method(report, options, backbone, method, schema, batches, environment)
            gc.collect()  # sharded models hold themselves in cycles, and their tables are large
    return report


def _measure_method(
    report: Report,
    options: Options,
    backbone: str,
    name: str,
    schema: Schema,
    batches: list[DomainBatch],
    environment: Environment,
) -> None:
    own: dict[str, Any] = {"experts_per_domain": options.experts_per_domain} if name == "moe_mlora" else {}
    method = METHODS[name](**own)
    divisions = schema.divisions if name == "multilora" else schema.divisions[:1]
    stages = [*method.stages(divisions), Stage(FULL, "joint", frozenset(ParameterGroup), method.route)]
    batches = with_divisions(batches, divisions)
    config = BACKBONES[backbone](hidden=options.hidden)
    runs = {}
    for stage in stages:
        model = config.build(schema, options.dim)
        runtime = build_runtime(model, method, divisions, stage, "rowwise_adagrad", options.dim, environment)
        runs[stage.name] = training(runtime, batches)
    model = config.build(schema, options.dim)
    floor = floor_of_adapting(model, method, divisions, "rowwise_adagrad", options.dim, environment)
    runs[FLOOR] = training(floor, batches)
    timings = interleave(runs, options.rounds)
    samples = 1e3 * options.batch_size * options.batches
    case: dict[str, str | int] = {"backbone": backbone, "method": name, "domains": options.domains}
    for stage in stages[1:]:
        context = {"ksamples/s": samples / timings.milliseconds(stage.name) / 1e3}
        for reference in (PRETRAIN, FULL):
            if stage.name != reference:
                goal = None
                if stage.settings == "adapt":
                    goal = ADAPT_GOALS.get(backbone)
                elif stage.name != FULL:
                    goal = COMBINE_GOAL
                ratio = timings.speed(stage.name, reference)
                report.add(Line(case, stage.name, reference, ratio, goal, context))
        if stage.settings == "adapt":
            goal = FLOOR_GOALS.get(backbone) if name == "mlora" else None
            report.add(Line(case, stage.name, FLOOR, timings.speed(stage.name, FLOOR), goal, context))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("stages", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
