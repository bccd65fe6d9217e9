"""Training on rows that lie in an object store, against the same rows on the local disk."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import build_runtime
from tests.storage.server import BUCKET, s3_server
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import SCHEMA_FILE, Schema
from torchrec_mdr.distributed.environment import process_group
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.methods.stage import pretrain_stage
from torchrec_mdr.prepare import prepare
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.storage import put_folder

DISK = "local disk"
# where the rows lie, and how large the node's cache is, in GB
CACHES = {"store, empty cache": 20.0, "store, warm cache": 20.0, "store, no cache": 1e-9}
GOAL = Goal(">=", 0.9)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        rows: of the synthetic data set, 80 % of them for training; a round is an epoch.
        num_embeddings: ids of its largest sparse feature.
        backbone: a key of BACKBONES.
        dim: width of the tables.
        hidden: widths of the MLP part's hidden layers.
        batch_size: rows.
        shuffle_rows: that are in memory at a time; the loader reads an epoch in rounds of so many.
        rounds: of each variant.
    """

    rows: int = 2_000_000
    num_embeddings: int = 100_000
    backbone: str = "mlp"
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128)
    batch_size: int = 4096
    shuffle_rows: int = 400_000
    rounds: int = 5


def measure(options: Options) -> Report:
    """Times epochs of pretraining on rows that are not kept in memory, opening the data included.

    They lie on disk, or in an S3 server (moto's) on loopback: with nothing in the node's cache, as in a first epoch;
    with all of them there, as in later ones; and without a cache, so that they are fetched in every epoch. The server
    is a Python process on the same cores.
    """
    report = Report("storage", "training rows per second", options)
    folder = prepare("synthetic", rows=options.rows, num_embeddings=options.num_embeddings)
    with s3_server() as settings, tempfile.TemporaryDirectory() as scratch, _environment(settings):
        stored = f"s3://{BUCKET}/data"
        put_folder(folder, stored, last=SCHEMA_FILE)
        with process_group() as environment:
            schema = Schema.load(folder)
            divisions = schema.divisions[:1]
            backbone = BACKBONES[options.backbone](hidden=options.hidden).build(schema, options.dim)
            runtime = build_runtime(backbone, MLoRA(), divisions, pretrain_stage(), "adam", options.dim, environment)
            numbers = count()

            def epoch(place: str) -> None:
                loader = DomainLoader(
                    place,
                    schema,
                    "train",
                    [divisions[0].name],
                    options.batch_size,
                    shuffle=True,
                    shuffle_rows=options.shuffle_rows,
                    memory_bytes=0,
                )
                for _ in runtime.train(loader.batches(next(numbers))):
                    pass

            variants: dict[str, Callable[[], None]] = {DISK: lambda: epoch(folder)}
            variants |= {name: _with_cache(name, scratch, lambda: epoch(stored)) for name in CACHES}
            timings = interleave(variants, options.rounds)
    case: dict[str, str | int] = {"rows": schema.rows["train"], "batch": options.batch_size}
    for name in CACHES:
        report.add(Line(case, name, DISK, timings.speed(name, DISK), GOAL))
    return report


def _with_cache(name: str, scratch: str, epoch: Callable[[], None]) -> Callable[[], None]:
    """An epoch with the node's cache as a variant wants it."""

    def run_epoch() -> None:
        own = tempfile.mkdtemp(dir=scratch) if name == "store, empty cache" else os.path.join(scratch, name)
        with _environment({"MDR_STORE_CACHE": own, "MDR_STORE_CACHE_GB": str(CACHES[name])}):
            epoch()

    return run_epoch


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("storage", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
