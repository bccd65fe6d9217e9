"""Compiled bundles of the papers' methods against a compiled bundle of their backbone, and what a change costs."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from benchmarks.report import Goal, Line, Report, run
from benchmarks.timing import interleave
from benchmarks.workload import click_schema, random_batches
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.schema import Division
from torchrec_mdr.inference import Run, Scorer, export
from torchrec_mdr.inference.freeze import known_ids
from torchrec_mdr.inference.package import flat_inputs
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import load, parse

LEAST_SECONDS = 0.01
Method = Literal["mlora", "multilora", "moe_mlora"]
# bounds of a compiled method over its compiled backbone, by batch, for 20 and for 1,000 domains
GOALS: dict[str, dict[int, tuple[float, float]]] = {
    "mlora": {1: (1.10, 1.10), 16: (1.15, 1.20), 256: (1.35, 1.80), 4096: (1.40, 1.80)},
    "multilora": {1: (1.20, 1.20), 4096: (2.50, 2.50)},
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        methods: those of the papers.
        domains: numbers of domains; of moe_mlora, whose experts all work for every row, those up to most_experts.
        most_experts: of moe_mlora.
        batch_sizes: rows of a call.
        hidden: widths of the over arch.
        dim: width of the embeddings.
        num_sparse: features.
        rows: embedding rows of all tables together.
        rounds: of each variant.
        most_seconds: of each variant in all.
        bundles: where bundles are kept from one call to the next, since compiling takes most of the time; by default
            they are thrown away.
    """

    methods: tuple[Method, ...] = ("mlora", "multilora", "moe_mlora")
    domains: tuple[int, ...] = (20, 1000)
    most_experts: int = 100
    batch_sizes: tuple[int, ...] = (1, 16, 256, 4096)
    hidden: tuple[int, ...] = (256, 128)
    dim: int = 16
    num_sparse: int = 26
    rows: int = 100_000
    rounds: int = 30
    most_seconds: float = 3.0
    bundles: str | None = None


def benchmark(options: Options) -> Report:
    """Time of one call: a compiled bundle, its eager form and the scorer around it, against the compiled backbone."""
    report = Report("serving", "time of a call", options)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(options.bundles or temporary)
        backbone = Scorer(_bundle(options, "mix", 2, folder))
        cases = [
            (m, n) for m in options.methods for n in options.domains if m != "moe_mlora" or n <= options.most_experts
        ]
        for method, domains in tqdm(cases, desc="serving", disable=None):
            bundle = _bundle(options, method, domains, folder)
            _compare(report, options, backbone, bundle, method, domains)
            if method == "mlora":
                _changes(report, bundle, domains)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run("serving", benchmark, Options, arguments)


def _bundle(options: Options, method: str, domains: int, folder: Path) -> str:
    """A bundle with random weights; made where it is not there yet."""
    sizes = f"{options.num_sparse}x{options.dim}-{'x'.join(map(str, options.hidden))}-{options.rows}"
    path = folder / f"{method}-{domains}-{sizes}"
    if path.is_dir():
        return str(path)
    divisions = [Division("scenario", domains), Division("gender", 3)][: 2 if method == "multilora" else 1]
    schema = click_schema(options.rows, options.num_sparse, 13, divisions)
    schema = replace(schema, rows=dict.fromkeys(("train", "validation", "test"), 0))
    with tempfile.TemporaryDirectory() as place:
        schema.save(place)
        given = [f"--dataset={place}/", f"--method={method}", "--backbone=dlrm", f"--embeddings.dim={options.dim}"]
        given += [f"--backbone_options.hidden={list(options.hidden)}", "--division=scenario"]
        given += ["--auxiliary_division=gender"] * (method == "multilora")
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(place, "config.yaml").write_text(parse(given).resolved)
        experiment = Experiment.of_schema(load(f"{place}/config.yaml"), schema, place)
        model = experiment.build_model().eval()
        materialize_tables(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        export(Run(place, experiment, model), str(path), resident=domains)
    return str(path)


def _compare(report: Report, options: Options, backbone: Scorer, bundle: str, method: str, domains: int) -> None:
    compiled, eager = Scorer(bundle), Scorer(bundle, compiled=False)
    manifest = compiled.manifest
    schema = click_schema(options.rows, options.num_sparse, 13, manifest.divisions)
    for batch_size in options.batch_sizes:
        batch = random_batches(schema, batch_size, 1)[0]
        shuffled = torch.randperm(batch_size, generator=torch.Generator().manual_seed(1))  # requests are not sorted
        ids = batch.domains.ids[shuffled]
        dense, features = batch.dense_features, batch.sparse_features
        variants: dict[str, Callable[[], object]] = {
            "backbone": _call(backbone, dense, features, torch.zeros(batch_size, 1, dtype=torch.int64)),
            "compiled": _call(compiled, dense, features, ids),
            "scorer": partial(compiled.score, dense, features, ids),
            "eager": _call(eager, dense, features, ids),
        }
        timings = interleave(variants, options.rounds, 3, LEAST_SECONDS, options.most_seconds)
        for variant in ("compiled", "scorer", "eager"):
            bounds = GOALS.get(method, {}).get(batch_size) if variant == "compiled" else None
            bound = None if bounds is None or domains not in (20, 1000) else Goal("<=", bounds[domains == 1000])
            case: dict[str, str | int] = {"method": method, "domains": domains, "batch": batch_size}
            context = {"ms": timings.milliseconds(variant), "backbone ms": timings.milliseconds("backbone")}
            report.add(Line(case, variant, "backbone", timings.ratio(variant, "backbone"), bound, context))


def _call(scorer: Scorer, dense: Tensor, features: KeyedJaggedTensor, ids: Tensor) -> Callable[[], object]:
    """The model alone, on tensors that are ready."""
    numbers = known_ids(ids, scorer.manifest.sizes)
    places = scorer.places(numbers)
    flat = flat_inputs(dense, features, places)
    return lambda: scorer.run_model(*flat)


def _changes(report: Report, bundle: str, domains: int) -> None:
    """What it takes to open a bundle, and to put an adapter into it."""
    started = time.perf_counter()
    scorer = Scorer(bundle)
    opened = time.perf_counter() - started
    name = scorer.manifest.divisions[0].domain_names[0]
    adapter = scorer.store.load(scorer.manifest.divisions[0].name, name, 1)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        version = scorer.put(adapter)
        seconds.append(time.perf_counter() - started)
    path = scorer.store.path(scorer.manifest.divisions[0].name, name, version)
    tensors = sum(tensor.nbytes for tensor in adapter.tensors.values())
    report.note(
        f"{domains} domains: opened in {opened:.2f} s (goal 1 s for 1,000), an adapter put in "
        f"{1e3 * statistics.median(seconds):.1f} ms (goal 5 ms), a file of {len(adapter.tensors)} tensors is "
        f"{os.path.getsize(path) - tensors} bytes larger than they are (goal {2048 + 150 * len(adapter.tensors)})"
    )


if __name__ == "__main__":
    sys.exit(main())
