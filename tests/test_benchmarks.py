"""Every benchmark runs in a tiny size, compares like with like, and prints and writes its ratios."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    adapter,
    domains,
    dropout,
    gpu,
    gpu_sizes,
    loader,
    million,
    peers,
    pipeline,
    serving,
    stages,
    storage,
    wrapping,
)
from benchmarks.peer_models import HamurLoop, StarLoop, SwitchedLoRA
from benchmarks.plain import PlainBatch, PlainMLP, plain_step, single_domain_batches
from benchmarks.rechub import RechubModel, rechub_models
from benchmarks.report import Goal
from benchmarks.timing import Timings, interleave
from benchmarks.workload import click_schema, random_batches, with_divisions
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.schema import Division, Schema
from torchrec_mdr.registry import BACKBONES

SMALL = ["--hidden=[8,4]", "--dim=4", "--rounds=3"]
TABLES = [
    *SMALL,
    "--rows=200",
    "--num_sparse=3",
    "--num_dense=2",
    "--batch_size=32",
    "--batches=2",
    "--backbones=[mlp]",
]
DATA = [*SMALL, "--rows=600", "--num_embeddings=20", "--batch_size=128"]
READY = ", ready batches"
PEERS = ["hamur-style loop", "star-style loop", "peft-style loop"]

RUNS: dict[str, tuple[Any, list[str], set[tuple[str, str]]]] = {
    "adapter": (
        adapter.main,
        ["--domains=[3]", "--layers=[[8,4,2]]", "--batch_sizes=[16]", "--rounds=3", "--orders=[sorted]"],
        {("adapted", against) for against in ("linear", "full fine-tuning", "gather", "masked", "loop")},
    ),
    "wrapping": (
        wrapping.main,
        ["--rounds=3", "--batch_size=16", "--num_embeddings=20", "--tables=2", "--dim=4", "--hidden=[8,4]"],
        {("wrapped, BASE", "plain")},
    ),
    "dropout": (
        dropout.main,
        ["--widths=[8]", "--batch_sizes=[16]", "--rounds=3"],
        {("FastDropout", "nn.Dropout")},
    ),
    "stages": (
        stages.main,
        [*TABLES, "--methods=[moe_mlora]", "--domains=3"],
        {
            *(("adapt", "pretrain"), ("adapt", "full fine-tuning"), ("gate", "pretrain"), ("gate", "full fine-tuning")),
            *(("full fine-tuning", "pretrain"), ("adapt", "floor")),
        },
    ),
    "domains": (
        domains.main,
        [*TABLES, "--domains=[30]", "--measures=[time,checkpoint,adam]"],
        {("30 domains", "10 domains"), *((f"{size} domains", domains.ONCE) for size in (10, 30))},
    ),
    "million": (
        million.main,
        [
            *("--domains=[2000]", "--distinct=20", "--hidden=[8,4]", "--rows=200", "--dim=4", "--num_sparse=3"),
            *("--num_dense=2", "--batch_size=32", "--batches=2", "--rounds=3"),
        ],
        {("2000 domains", "1000 domains")},
    ),
    "pipeline": (pipeline.main, DATA, {("pipeline", "plain PyTorch"), ("evaluation", "pipeline")}),
    "loader": (
        loader.main,
        DATA,
        {(v, f"{stage}{READY}") for stage in ("pretrain", "adapt") for v in ("loader", f"{stage}, loader")},
    ),
    "storage": (
        storage.main,
        [*DATA, "--shuffle_rows=240"],
        {(name, storage.DISK) for name in storage.CACHES},
    ),
    "peers": (
        peers.main,
        [*SMALL, "--batch_size=64", "--batches=2"],
        {
            (v, peer)
            for v in ("mlora adapt", f"mlora adapt{peers.STANDING}", "mlora joint", "pretrain")
            for peer in PEERS
        },
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name == "storage" else []) for name in RUNS]
)
def test_a_benchmark_prints_and_writes_its_ratios(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "torch_rechub", None)  # as if not installed
    monkeypatch.setattr(adapter, "LEAST_SECONDS", 0.0)
    main, arguments, pairs = RUNS[name]
    path = tmp_path / "report.json"
    assert main([*arguments, f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["benchmark"] == name and report["environment"]["threads"] == torch.get_num_threads()
    assert {(line["variant"], line["against"]) for line in report["lines"]} == pairs
    for line in report["lines"]:
        ratio = line["ratio"]
        assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"] < math.inf
        shown = [row for row in printed.splitlines() if f"{ratio['median']:.3f}" in row.split()]
        assert any(line["variant"] in row and line["against"] in row for row in shown), line
    assert ("torch-rechub is left out" in printed) == (name == "peers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", [gpu, gpu_sizes])
def test_without_a_gpu_its_benchmarks_say_so(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 0
    assert "Nothing is measured: there is no GPU." in capsys.readouterr().out


def test_peak_memory_is_measured() -> None:
    options = domains.Options(rows=200, dim=4, num_sparse=3, num_dense=2, hidden=(8, 4), batch_size=32, batches=2)
    assert domains.peak_memory(options, "mlp", 3) > 1e6


def test_a_wrong_option_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert stages.main(["--backbones=[lenet]"]) == 2
    assert "there is no backbone 'lenet'" in capsys.readouterr().err
    assert stages.main(["--rows=100"]) == 2
    assert "26 tables need 260 embedding rows at least, not 100" in capsys.readouterr().err


def test_rounds_are_interleaved_and_slow_variants_have_fewer() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(variants, rounds=4, warmup=2)
    assert "".join(calls) == "aabbcc" + 4 * "abc"
    assert {len(seconds) for seconds in timings.seconds.values()} == {4}
    assert {len(s) for s in interleave(variants, rounds=9, most_seconds=0.0).seconds.values()} == {3}


def test_a_ratio_is_of_the_same_round() -> None:
    timings = Timings({"a": [2.0, 8.0, 3.0], "b": [1.0, 2.0, 3.0, 100.0]})
    assert timings.ratio("a", "b").median == 2.0
    assert (timings.ratio("a", "b").lowest, timings.ratio("a", "b").highest) == (1.0, 4.0)
    assert timings.speed("a", "b").median == 0.5
    assert timings.milliseconds("a") == 3000.0


def test_goals() -> None:
    assert Goal("<=", 1.15).is_met(1.15) and not Goal("<=", 1.15).is_met(1.16)
    assert Goal(">=", 2.0).is_met(2.0) and not Goal(">=", 2.0).is_met(1.99)
    large, small = (1024, 512, 16), (256, 128, 8)
    bounds = {n: adapter.goal("forward", large, 4096, n) for n in (2, 20, 21, 300, 1000, 1001)}
    assert [goal and goal.bound for goal in bounds.values()] == [1.15, 1.15, 1.30, 1.30, 1.60, None]
    assert adapter.goal("forward", small, 4096, 20) == Goal("<=", 1.6)
    assert adapter.goal("forward", small, 4096, 21) is None
    assert adapter.goal("forward", large, 1024, 2) is None
    assert adapter.goal("first layer", large, 4096, 20) == Goal("<=", 0.8)
    assert adapter.goal("forward+backward", large, 4096, 300) is None


@pytest.mark.parametrize("is_sorted", [True, False])
def test_all_ways_to_adapt_a_layer_give_the_same(is_sorted: bool) -> None:
    layers = adapter.Layers((6, 4, 2), 20, 5, is_sorted, torch.float32)
    ids, bank = layers.groups.ids, layers.bank
    expected = torch.stack(
        [
            layers.layer._output(row) + bank.lora_B[d] @ (bank.lora_A[d] @ row) + bank.bias[d]
            for row, d in zip(layers.x, ids, strict=True)
        ]
    )
    gradients = torch.autograd.grad(expected, list(bank.parameters()), layers.gradient)
    for name, (forward, weights) in layers.variants.items():
        if name == "linear":
            continue
        output = forward(layers.x)
        torch.testing.assert_close(output, expected, msg=lambda m, name=name: f"{name}: {m}")
        found = torch.autograd.grad(output, weights, layers.gradient)
        wanted = list(gradients)
        if name == "loop":  # a matrix, and another with its bias below, of each domain that is present
            found = [torch.stack(part) for part in (found[0::2], found[1::2])]
            of_A, of_B, of_bias = (gradient[ids.unique()] for gradient in gradients)
            wanted = [of_A, torch.cat([of_B.mT, of_bias.unsqueeze(1)], 1)]
        for own, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, reference, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def schema() -> Schema:
    return click_schema(300, 3, 2, (Division("scenario", 3), Division("segment", 2)))


def test_random_batches_are_as_the_loader_makes_them(schema: Schema) -> None:
    batches = random_batches(schema, 50, 2)
    for batch in batches:
        ids = batch.domains.ids.tolist()
        assert ids == sorted(ids) and len({tuple(row) for row in ids}) == 6
        values = batch.sparse_features.values().view(3, 50)
        assert all(
            0 <= v.min() and v.max() < f.num_embeddings for v, f in zip(values, schema.sparse_features, strict=True)
        )
    (first, _) = with_divisions(batches, schema.divisions[:1])
    assert first.domains.ids.tolist() == [row[:1] for row in batches[0].domains.ids.tolist()]
    assert first.sparse_features is batches[0].sparse_features


def test_single_domain_batches_hold_the_same_rows(schema: Schema) -> None:
    mixed = [PlainBatch.of(batch) for batch in random_batches(schema, 50, 2)]
    single = single_domain_batches(mixed, 20)
    assert all(set(batch.domains.tolist()) == {batch.domain} and len(batch.labels) <= 20 for batch in single)
    columns = [
        torch.cat([torch.cat([b.ids, b.dense], 1) for b in batches]).sort(0).values for batches in (mixed, single)
    ]
    assert torch.equal(*columns)


def test_the_plain_model_is_the_backbone(schema: Schema) -> None:
    batch = random_batches(schema, 20, 1)[0]
    backbone = materialize_tables(BACKBONES["mlp"](hidden=(8, 4)).build(schema, 4))
    plain = PlainMLP(schema, 4, (8, 4))
    names = [name for name, _ in backbone.named_parameters()]
    tables = [p for n, p in backbone.named_parameters() if "embedding_bags" in n]
    rest = [p for n, p in backbone.named_parameters() if "embedding_bags" not in n]
    assert len(names) == len(list(plain.parameters()))
    for own, other in zip(plain.parameters(), [*tables, *rest], strict=True):
        own.data.copy_(other.data)
    logits = backbone(batch.dense_features, batch.sparse_features).squeeze(1)
    torch.testing.assert_close(plain(PlainBatch.of(batch)), logits)


@pytest.mark.parametrize("model", [HamurLoop, StarLoop])
def test_a_loop_gives_every_row_its_own_domains_path(schema: Schema, model: Any) -> None:
    torch.manual_seed(0)
    batch = PlainBatch.of(random_batches(schema, 20, 1)[0])
    loop = model(schema, 4, 3, (8, 4)).eval()
    logits = loop(batch)
    features = loop.embeddings(batch)
    paths = torch.cat([loop.path(domain, features, loop.shared(features)) for domain in range(3)], 1)
    assert not torch.allclose(paths[:, 0], paths[:, 1])
    torch.testing.assert_close(logits, torch.stack([paths[i, d] for i, d in enumerate(batch.domains)]))


def test_switched_adapters_train_alone(schema: Schema) -> None:
    mixed = [PlainBatch.of(batch) for batch in random_batches(schema, 50, 1)]
    model = SwitchedLoRA(schema, 4, 3, (8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = plain_step(model)
    for batch in single_domain_batches(mixed, 50)[:1] * 2:
        step(batch)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("adapters.0.")}


def test_rechub_models_are_asked_for_the_rows_own_domain(schema: Schema) -> None:
    pytest.importorskip("torch_rechub")
    batch = PlainBatch.of(random_batches(schema, 20, 1)[0])
    for name, model in rechub_models(schema, 4, 3, (8, 4)).items():
        assert model.eval()(batch).shape == (20,), name


def test_a_models_columns_are_domains(schema: Schema) -> None:
    class Columns(nn.Module):
        def forward(self, columns: dict[str, torch.Tensor]) -> torch.Tensor:
            assert set(columns) == {"sparse_0", "sparse_1", "sparse_2", "dense_0", "dense_1"}
            return torch.tensor([0.0, 0.1, 0.2]).expand(columns["dense_0"].numel(), 3)

    batch = PlainBatch.of(random_batches(schema, 20, 1)[0])
    torch.testing.assert_close(RechubModel(Columns(), schema)(batch), batch.domains / 10)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_serving_measures_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden=[8,4]", "--dim=4", "--num_sparse=3", "--rows=200", "--rounds=3", "--batch_sizes=[1,16]"]
    path = tmp_path / "report.json"
    given = [*small, "--methods=[mlora]", "--domains=[4]", f"--json={path}", f"--bundles={tmp_path / 'kept'}"]
    assert serving.main(given) == 0 and serving.main(given) == 0  # the second time from what was kept
    lines = json.loads(path.read_text())["lines"]
    assert {(line["variant"], line["case"]["batch"]) for line in lines} == {
        (variant, batch) for variant in ("compiled", "scorer", "eager") for batch in (1, 16)
    }
    assert all(line["ratio"]["median"] > 0 for line in lines)
    assert "4 domains: opened in" in capsys.readouterr().out
