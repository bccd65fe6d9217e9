"""Samples per second of this package's stages against other ways to train for many domains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from torch import nn

from benchmarks.peer_models import HamurLoop, StarLoop, SwitchedLoRA
from benchmarks.plain import PlainBatch, plain_step, single_domain_batches
from benchmarks.rechub import rechub_models
from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import build_runtime, random_batches, training, with_divisions
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.distributed.environment import Environment, process_group
from torchrec_mdr.methods import MLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.methods.stage import pretrain_stage
from torchrec_mdr.prepare import prepare
from torchrec_mdr.registry import BACKBONES, METHODS

MOVIELENS = {"user": 6040, "gender": 2, "occupation": 21, "zip": 3439, "movie": 3706, "genre": 18, "age3": 3}
RECHUB = "torch-rechub "
PEFT = "peft-style loop"
STANDING = ", norms as they stand"  # as in PEFT's loop: no statistics of the batch
PRETRAIN = "pretrain"
# of our samples per second over theirs; adapters alone train in PEFT's loop, so it says nothing of a joint stage
GOALS = {
    "hamur-style loop": Goal(">=", 2.0),
    "star-style loop": Goal(">=", 2.0),
    PEFT: Goal(">=", 1.0),
    f"{RECHUB}shared_bottom": Goal(">=", 1.0),
    f"{RECHUB}mmoe": Goal(">=", 1.0),
    f"{RECHUB}ple": Goal(">=", 1.0),
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        methods: ours; each with its adapt stages, by statistics of the batch and as norms stand, and its joint stage.
        data_dir: folder of MovieLens-1M; random rows of its shape where left out.
        domains: of the natural division of random rows, which are all equally frequent.
        peers: what is measured against; all where left out.
        dim: width of the tables.
        hidden: widths of the hidden layers, each with batch norm.
        batch_size: rows.
        batches: steps of a round; all train on the same rows.
        rounds: of each variant.
    """

    methods: tuple[Literal["mlora", "single_lora", "multilora"], ...] = ("mlora",)
    data_dir: str | None = None
    domains: int = MOVIELENS["age3"]
    peers: tuple[str, ...] = ()
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128)
    batch_size: int = 4096
    batches: int = 10
    rounds: int = 10


def measure(options: Options) -> Report:
    """Times stages on the `mlp` backbone against peers of the same sizes on the same rows, all with Adam.

    Peers run in a plain loop, their batches as tensors on the device. The loops in the style of HAMUR and STAR send the
    whole batch through every domain's path; the one in PEFT's style has batches of one domain.
    """
    report = Report("peers", "samples per second", options)
    schema, batches = _movielens(options) if options.data_dir else _random(options)
    with process_group() as environment:
        ours = _ours(options, schema, batches, environment)
        peers = _peers(report, options, schema, batches, environment)
        unknown = [name for name in options.peers if name not in peers]
        if unknown:
            raise ValueError(f"--peers: '{unknown[0]}' is unknown; choose from {', '.join(peers)}")
        peers = {name: loop for name, loop in peers.items() if name in (options.peers or peers)}
        timings = interleave({**ours, **peers}, options.rounds)
    samples = sum(batch.global_rows for batch in batches)
    data = "movielens-1m" if options.data_dir else "random"
    for variant in ours:
        for peer in peers:
            not_alike = variant == PRETRAIN or (peer == PEFT and variant.endswith("joint"))
            goal = None if not_alike else GOALS.get(peer)
            context = {"ksamples/s": samples / timings.milliseconds(variant)}
            domains = schema.divisions[0].num_domains
            case: dict[str, str | int] = {"data": data, "batch": options.batch_size, "domains": domains}
            report.add(Line(case, variant, peer, timings.speed(variant, peer), goal, context))
    return report


def _random(options: Options) -> tuple[Schema, list[DomainBatch]]:
    sparse = tuple(SparseFeature(name, size) for name, size in MOVIELENS.items())
    divisions = (Division("age3", options.domains), Division("gender", MOVIELENS["gender"]))
    schema = Schema("random", "label", sparse, ("age",), divisions, {})
    return schema, random_batches(schema, options.batch_size, options.batches)


def _movielens(options: Options) -> tuple[Schema, list[DomainBatch]]:
    folder = prepare("movielens-1m", data_dir=options.data_dir, division="age3", protocol="multilora")
    schema = Schema.load(folder)
    divisions = schema.division("age3"), schema.division("gender")
    names = [division.name for division in divisions]
    loader = DomainLoader(folder, schema, "train", names, options.batch_size, shuffle=True)
    batches = loader.batches(0, stop=options.batches)
    return replace(schema, divisions=divisions), list(islice(batches, options.batches))


def _ours(
    options: Options, schema: Schema, batches: list[DomainBatch], environment: Environment
) -> dict[str, Callable[[], None]]:
    runs = {}
    for name in options.methods:
        method = METHODS[name]()
        assert isinstance(method, (MLoRA, SingleLoRA, MultiLoRA))
        divisions = schema.divisions if name == "multilora" else schema.divisions[:1]
        own = with_divisions(batches, divisions)
        for variant in (method, replace(method, schedule="joint")):
            for stage in variant.stages(divisions):
                for noise in (True, False):
                    if stage.name == "pretrain" or (not noise and stage.settings != "adapt"):
                        continue
                    backbone = BACKBONES["mlp"](hidden=options.hidden, batch_norm=True)
                    model = backbone.build(schema, options.dim)
                    runtime = build_runtime(
                        model, variant, divisions, stage, "adam", options.dim, environment, noise=noise
                    )
                    runs[f"{name} {stage.name}{'' if noise else STANDING}"] = training(runtime, own)
    return runs | {PRETRAIN: _pretraining(options, schema, batches, environment)}


def _pretraining(
    options: Options, schema: Schema, batches: list[DomainBatch], environment: Environment
) -> Callable[[], None]:
    """The backbone alone, all of it: what a joint stage could reach if adapters cost nothing."""
    model = BACKBONES["mlp"](hidden=options.hidden, batch_norm=True).build(schema, options.dim)
    divisions = schema.divisions[:1]
    runtime = build_runtime(model, MLoRA(), divisions, pretrain_stage(), "adam", options.dim, environment)
    return training(runtime, with_divisions(batches, divisions))


def _peers(
    report: Report, options: Options, schema: Schema, batches: list[DomainBatch], environment: Environment
) -> dict[str, Callable[[], None]]:
    mixed = [PlainBatch.of(batch).to(environment.device) for batch in batches]
    sizes = schema, options.dim, schema.divisions[0].num_domains, options.hidden
    peers = {
        "hamur-style loop": _loop(HamurLoop(*sizes), mixed, environment),
        "star-style loop": _loop(StarLoop(*sizes), mixed, environment),
        PEFT: _loop(SwitchedLoRA(*sizes), single_domain_batches(mixed, options.batch_size), environment),
    }
    try:
        for name, model in rechub_models(*sizes).items():
            peers[f"{RECHUB}{name}"] = _loop(model, mixed, environment, gives_logits=False)
    except ImportError as error:
        report.note(f"torch-rechub is left out, since it cannot be imported ({error}); pip install torch-rechub")
    return peers


def _loop(
    model: nn.Module, batches: Sequence[PlainBatch], environment: Environment, gives_logits: bool = True
) -> Callable[[], None]:
    step = plain_step(model.to(environment.device), gives_logits)

    def train() -> None:
        for batch in batches:
            step(batch)

    return train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("peers", measure, Options, arguments)


if __name__ == "__main__":
    sys.exit(main())
