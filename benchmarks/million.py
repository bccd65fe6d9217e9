"""Sharded banks by the number of domains: step time, memory and bytes sent, at the same number of distinct domains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import Ratio, interleave
from benchmarks.workload import click_schema, random_batches, training
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed.bank_sharding import DATA_TYPES, BankTraining, BankType
from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.distributed.planning import Cluster, Load, plan_stage
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.methods.stage import ADAPTERS, adapt_stage
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.prepared_stage import prepare_stage
from torchrec_mdr.training.stage_runtime import StageRuntime

REFERENCE = 1000  # domains
GOAL = Goal("<=", 1.5)
TERABYTE = 10**12


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        domains: numbers of domains; 1,000, which all are held against, comes in any case.
        distinct: distinct domains of a batch, at most 1,000.
        bank_type: of the tables.
        rank: of the adapters.
        backbone: a key of BACKBONES.
        hidden: widths of the MLP part's hidden layers.
        rows: embedding rows of all tables together.
        dim: width of the tables.
        num_sparse: tables; with 6 of width 16, a domain of `dlrm` has 3,092 numbers at rank 4.
        num_dense: dense features.
        batch_size: rows.
        batches: steps of a round.
        rounds: of each number of domains.
    """

    domains: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    distinct: int = 1000
    bank_type: BankType = "fp16"
    rank: int = 4
    backbone: str = "dlrm"
    hidden: tuple[int, ...] = (256, 128)
    rows: int = 100_000
    dim: int = 16
    num_sparse: int = 6
    num_dense: int = 13
    batch_size: int = 4096
    batches: int = 5
    rounds: int = 10


def measure(options: Options) -> Report:
    """Compares mlora's adapt stage over numbers of domains, in one process, all of them in turns.

    Memory is that of the banks with their optimizer's state; what a rank of two would send in a step is planned.
    """
    if options.backbone not in BACKBONES:
        raise ValueError(f"there is no backbone '{options.backbone}'; choose from {', '.join(BACKBONES)}")
    if not 1 <= options.distinct <= REFERENCE:
        raise ValueError(f"distinct must lie between 1 and {REFERENCE}, not {options.distinct}")
    report = Report("million", "sharded banks: step time, memory, bytes sent", options)
    sizes = sorted({*options.domains, REFERENCE})
    with process_group() as environment:
        stages = {size: _adapt_stage(options, size, environment) for size in sizes}
        timings = interleave({str(s): training(*stage) for s, stage in stages.items()}, options.rounds)
        held = {size: _held(runtime) for size, (runtime, _) in stages.items()}
    sent = {size: _sent(options, size) for size in sizes}
    for size in sizes:
        if size == REFERENCE:
            continue
        milliseconds = {"ms": timings.milliseconds(str(size)) / options.batches}
        report.add(_line("step time", size, timings.ratio(str(size), str(REFERENCE)), GOAL, milliseconds))
        for what, found in (("memory of banks", held), ("sent, planned for two ranks", sent)):
            ratio = Ratio.single(found[size] / found[REFERENCE])
            report.add(_line(what, size, ratio, None, {"MB": found[size] / 1e6}))
    return report


def _model(options: Options, num_domains: int) -> MultiDomainModel:
    divisions = (Division("scenario", num_domains),)
    schema = click_schema(options.rows, options.num_sparse, options.num_dense, divisions)
    backbone = BACKBONES[options.backbone](hidden=options.hidden).build(schema, options.dim)
    bank_type = DATA_TYPES[options.bank_type]
    return MultiDomainModel(backbone, MLoRA(rank=options.rank), divisions, None, "sharded", bank_type)


def _adapt_stage(
    options: Options, num_domains: int, environment: Environment
) -> tuple[StageRuntime, list[DomainBatch]]:
    config = EmbeddingConfig(dim=options.dim, optimizer="rowwise_adagrad")
    runtime = StageRuntime(_model(options, num_domains), adapt_stage(), StageConfig(), config, None, 0, environment)
    schema = click_schema(options.rows, options.num_sparse, options.num_dense, (Division("scenario", num_domains),))
    batches = random_batches(schema, options.batch_size, options.batches)
    return runtime, [_with_distinct(batch, options.distinct, num_domains, i) for i, batch in enumerate(batches)]


def _with_distinct(batch: DomainBatch, distinct: int, num_domains: int, seed: int) -> DomainBatch:
    """The batch, its rows spread evenly over so many random domains."""
    rows = len(batch.labels)
    chosen = torch.randperm(num_domains, generator=torch.Generator().manual_seed(seed))[:distinct].sort().values
    ids = chosen[torch.arange(rows) * min(distinct, num_domains) // rows].unsqueeze(1)
    return replace(batch, domains=BatchDomains(ids, (), (num_domains,)))


def _held(runtime: StageRuntime) -> int:
    """Bytes of the banks and of their fused optimizer's state."""
    total = 0
    for tensor in (*runtime.state(frozenset({ADAPTERS})).values(), *runtime.fused_tensors().values()):
        pieces = [s.tensor for s in tensor.local_shards()] if isinstance(tensor, ShardedTensor) else [tensor]
        total += sum(piece.numel() * piece.element_size() for piece in pieces)
    return total


def _sent(options: Options, num_domains: int) -> float:
    model = _model(options, num_domains)
    prepare_stage(model, adapt_stage())
    load = Load(2 * options.batch_size, min(options.distinct, num_domains), False, False, True)
    config = EmbeddingConfig(dim=options.dim, optimizer="rowwise_adagrad", sharding="table_wise")
    return plan_stage(model, config, BankTraining(), load, Cluster(2, TERABYTE, TERABYTE, 2, "cpu")).sent


def _line(what: str, size: int, ratio: Ratio, goal: Goal | None, context: dict[str, float]) -> Line:
    return Line({"measure": what}, f"{size} domains", f"{REFERENCE} domains", ratio, goal, context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("million", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
