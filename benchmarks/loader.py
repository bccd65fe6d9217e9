"""Rows per second of the loader alone, against what training consumes of the same rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from benchmarks.report import Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import build_runtime, training
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.distributed.environment import process_group
from torchrec_mdr.distributed.sharding import EmbeddingOptimizer
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.prepare import prepare
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.stage_runtime import StageRuntime


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        folder: a prepared data set; synthetic data where left out.
        rows: of the synthetic data set, 80 % of them for training; a round is an epoch.
        num_embeddings: ids of its largest sparse feature.
        backbone: a key of BACKBONES.
        optimizer: of the tables, where they train.
        dim: width of the tables.
        hidden: widths of the MLP part's hidden layers.
        batch_size: rows.
        rounds: of each variant.
    """

    folder: str | None = None
    rows: int = 250_000
    num_embeddings: int = 10_000
    backbone: str = "mlp"
    optimizer: EmbeddingOptimizer = "adam"
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128)
    batch_size: int = 4096
    rounds: int = 10


def measure(options: Options) -> Report:
    """Times epochs of the loader, of MLoRA's stages on batches made beforehand, and of both together.

    The loader keeps up where it is quicker than a stage alone; what it costs a stage is in the last two lines.
    """
    if options.backbone not in BACKBONES:
        raise ValueError(f"there is no backbone '{options.backbone}'; choose from {', '.join(BACKBONES)}")
    report = Report("loader", "rows per second", options)
    folder = options.folder or prepare("synthetic", rows=options.rows, num_embeddings=options.num_embeddings)
    schema = Schema.load(folder)
    divisions = schema.divisions[:1]
    loader = DomainLoader(folder, schema, "train", [divisions[0].name], options.batch_size, shuffle=True)
    ready = list(loader.batches(0))
    variants: dict[str, Callable[[], None]] = {"loader": _read(loader)}
    stages = MLoRA().stages(divisions)
    with process_group() as environment:
        for stage in stages:
            backbone = BACKBONES[options.backbone](hidden=options.hidden).build(schema, options.dim)
            runtime = build_runtime(backbone, MLoRA(), divisions, stage, options.optimizer, options.dim, environment)
            variants[f"{stage.name}, ready batches"] = training(runtime, ready)
            variants[f"{stage.name}, loader"] = _train(runtime, loader)
        timings = interleave(variants, options.rounds)
    case: dict[str, str | int] = {"rows": loader.num_rows, "batch": options.batch_size, "backbone": options.backbone}
    pairs = [("loader", f"{stage.name}, ready batches") for stage in stages]
    pairs += [(f"{stage.name}, loader", f"{stage.name}, ready batches") for stage in stages]
    for variant, reference in pairs:
        context = {"krows/s": loader.num_rows / timings.milliseconds(variant)}
        report.add(Line(case, variant, reference, timings.speed(variant, reference), context=context))
    return report


def _read(loader: DomainLoader) -> Callable[[], None]:
    epochs = _epochs(loader)

    def epoch() -> None:
        for _ in next(epochs):
            pass

    return epoch


def _train(runtime: StageRuntime, loader: DomainLoader) -> Callable[[], None]:
    epochs = _epochs(loader)

    def epoch() -> None:
        for _ in runtime.train(next(epochs)):
            pass

    return epoch


def _epochs(loader: DomainLoader) -> Iterator[Iterator[DomainBatch]]:
    return (loader.batches(epoch) for epoch in count())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("loader", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
