"""Runs with sharded banks: what they come to, stop at, resume from and hand over to runs with replicated ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.stage_runs import environment
from tests.distributed.test_banks import METHOD, rows_of, runtime_of
from tests.helpers import build_backbone, randomise
from tests.ranks import RankPool
from torchrec_mdr.adapters.bank import LoRABank
from torchrec_mdr.backbones.tables import materialize_tables
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.stored_rows import StoredTensor
from torchrec_mdr.inference import blocks, load_run, read_adapter
from torchrec_mdr.inference.adapter_file import AdapterFile
from torchrec_mdr.inference.export import export
from torchrec_mdr.inference.hand_over import adapter_of_run, all_adapters, write_adapters
from torchrec_mdr.inference.scorer import Scorer
from torchrec_mdr.methods.stage import ADAPTERS
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.train import main, run
from torchrec_mdr.training import bank_choice
from torchrec_mdr.training.new_domains import load_with_new_domains
from torchrec_mdr.training.stage_checkpoint import StageCheckpoints
from torchrec_mdr.training.stored_banks import has_tables, load_state

SMALL = [
    *("--dataset=synthetic", "--dataset_options.rows=4000", "--dataset_options.num_domains=6", "--backbone=dlrm"),
    *("--backbone_options.hidden=[8,6]", "--batch_size=256", "--method_options.rank=2", "--stages.pretrain.epochs=1"),
    *("--stages.adapt.epochs=3", "--stages.adapt.learning_rate=0.05", "--stages.adapt.ema_rows=0"),
    *("--embeddings.optimizer=sgd", "--stages.adapt.hooks=[]"),
]
SHARDED = [*SMALL, "--banks=sharded", "--bank_optimizer=adagrad"]


def trained(arguments: list[str], folder: str) -> dict[str, Any]:
    """The metrics of a run."""
    run([*arguments, f"--output_dir={folder}"], environment())
    with open(os.path.join(folder, "metrics.json")) as file:
        metrics: dict[str, Any] = json.load(file)
    return metrics


def test_a_run_comes_to_the_same_on_one_and_two_ranks(tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    one = one_rank.run(trained, SHARDED, str(tmp_path / "one"))[0]
    two = two_ranks.run(trained, SHARDED, str(tmp_path / "two"))[0]
    for name in ("auc", "logloss"):
        assert abs(one["test"][name] - two["test"][name]) < 2e-4
    start, end = (stage["validation"]["domains"] for stage in two["stages"])
    gains = [end[d]["auc"] - start[d]["auc"] for d in start if start[d]["auc"] is not None]
    assert min(gains) >= -1e-9 and max(gains) > 0.001  # each domain keeps its own best
    assert two["parameters"]["adapters"] == one["parameters"]["adapters"] > 6 * 100
    model = load_run(str(tmp_path / "two")).model  # with replicated banks
    banks = [module for module in model.modules() if isinstance(module, LoRABank)]
    assert len(banks) == 2 and all(bank.lora_B.abs().sum() > 0 for bank in banks)


def test_steps_that_make_it_worse_are_taken_back(tmp_path: Path, two_ranks: RankPool) -> None:
    wild = [*SHARDED, "--stages.adapt.learning_rate=30"]
    two = two_ranks.run(trained, wild, str(tmp_path))[0]
    start, end = (stage["validation"]["domains"] for stage in two["stages"])
    assert all(end[d]["auc"] >= start[d]["auc"] - 1e-9 for d in start if start[d]["auc"] is not None)
    assert not (tmp_path / "checkpoints" / "adapt.progress").exists()


class Killed(BaseException):
    """What ends a run at a place."""


def killed(arguments: list[str], folder: str, stage: str = "adapt") -> None:
    """A run that ends after the third checkpoint of a stage is begun."""
    save, count = StageCheckpoints.save, [0]

    def failing(self: StageCheckpoints, *args: Any) -> None:
        save(self, *args)
        count[0] += self.runtime.stage.name == stage
        if count[0] == 3:
            raise Killed

    StageCheckpoints.save = failing  # type: ignore[method-assign]
    try:
        run([*arguments, f"--output_dir={folder}"], environment())
    except Killed:
        return
    finally:
        StageCheckpoints.save = save  # type: ignore[method-assign]
    raise AssertionError("the run came to its end")


@pytest.mark.full
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, two_ranks: RankPool) -> None:
    whole_run = two_ranks.run(trained, SHARDED, str(tmp_path / "whole"))[0]
    two_ranks.run(killed, SHARDED, str(tmp_path / "broken"))
    resumed = two_ranks.run(trained, [*SHARDED, "--resume"], str(tmp_path / "broken"))[0]
    assert resumed["test"] == whole_run["test"]
    assert resumed["stages"][1]["steps"] == whole_run["stages"][1]["steps"]


@pytest.mark.full
def test_a_top_k_gate_trains_over_sharded_banks_goes_on_and_serves(
    tmp_path: Path, two_ranks: RankPool, one_rank: RankPool
) -> None:
    gate = ["--stages.gate.epochs=3", "--stages.gate.learning_rate=0.05", "--stages.gate.hooks=[]"]
    arguments = [*SHARDED, *gate, "--method=moe_mlora", "--method_options.top_k=2"]
    whole_run = two_ranks.run(trained, arguments, str(tmp_path / "whole"))[0]
    two_ranks.run(killed, arguments, str(tmp_path / "broken"), "gate")
    resumed = two_ranks.run(trained, [*arguments, "--resume"], str(tmp_path / "broken"))[0]
    assert resumed["test"] == whole_run["test"] and resumed["stages"][2]["steps"] == whole_run["stages"][2]["steps"]
    replicated = [*arguments, "--banks=replicated", "--bank_optimizer=auto"]
    other = one_rank.run(trained, replicated, str(tmp_path / "replicated"))[0]
    assert abs(other["test"]["logloss"] - whole_run["test"]["logloss"]) < 0.02
    combination = json.loads((tmp_path / "whole" / "combination.json").read_text())
    rows = list(next(iter(combination["layers"].values())).values())
    assert all(sum(weight > 0 for weight in row) == 2 and row[domain] > 0 for domain, row in enumerate(rows))
    run_of = load_run(str(tmp_path / "whole"))
    export(run_of, str(tmp_path / "bundle"), compiled=False)  # golden rows get the run's logits
    assert Scorer(str(tmp_path / "bundle")).manifest.options["top_k"] == 2


@pytest.mark.full
@pytest.mark.parametrize("method", ["multilora", "moe_mlora", "single_lora"])
def test_other_methods_run(method: str, tmp_path: Path, two_ranks: RankPool) -> None:
    arguments = [argument for argument in SHARDED if "auxiliary" not in argument]
    found = two_ranks.run(trained, [*arguments, f"--method={method}"], str(tmp_path / "run"))[0]
    assert found["test"]["auc"] > found["test_backbone"]["auc"] - 0.05
    assert load_run(str(tmp_path / "run")).model.method is not None


def replicated(folder: str, shops: int) -> dict[str, Tensor]:
    """Rows of a model with replicated banks that loads a checkpoint; where there is none, it writes one."""
    torch.manual_seed(5)
    model = MultiDomainModel(materialize_tables(build_backbone("dlrm")), METHOD, [Division("shop", shops)])
    if os.path.isdir(folder):
        load_state(folder, model, dict(model.state_dict()))
    else:
        randomise(dict(model.state_dict()), seed=1)
        checkpoint.save(folder, dict(model.state_dict()), {"divisions": {"shop": shops}})
    return rows_of(model)


def sharded(folder: str, target: str) -> dict[str, Tensor]:
    """Rows of a model with sharded banks that loads a checkpoint of one with replicated ones, and writes one."""
    runtime = runtime_of(METHOD, "sgd", True)
    state = checkpoint.model_state(runtime.sharded)
    load_state(folder, runtime.model, state)
    checkpoint.save(target, state, {"divisions": {"shop": 9}})
    return rows_of(runtime.model)


def test_checkpoints_of_either_form_load_into_the_other(
    tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    written = one_rank.run(replicated, str(tmp_path / "replicated"), 9)[0]
    found = two_ranks.run(sharded, str(tmp_path / "replicated"), str(tmp_path / "sharded"))[1]
    back = one_rank.run(replicated, str(tmp_path / "sharded"), 9)[0]
    for name, rows in written.items():
        assert torch.equal(found[name], rows) and torch.equal(back[name], rows) and rows.any()


def grown(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of new sharded banks for 12 shops, before and after a checkpoint of 9 is loaded."""
    from tests.distributed import test_banks

    before, test_banks.SHOPS = test_banks.SHOPS, (Division("shop", 12),)
    try:
        runtime = runtime_of(METHOD, "sgd", True)
    finally:
        test_banks.SHOPS = before
    fresh = rows_of(runtime.model)
    load_with_new_domains(runtime.model, folder, state=runtime.state(frozenset({ADAPTERS})))
    return fresh, rows_of(runtime.model)


@pytest.mark.parametrize("form", ["replicated", "sharded"])
def test_new_domains_append_rows(form: str, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    old = one_rank.run(replicated, str(tmp_path / "replicated"), 9)[0]
    two_ranks.run(sharded, str(tmp_path / "replicated"), str(tmp_path / "sharded"))
    fresh, after = two_ranks.run(grown, str(tmp_path / form))[0]
    for name, rows in after.items():
        assert len(rows) == 12 and torch.equal(rows[:9], old[name]) and torch.equal(rows[9:], fresh[name][9:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile=true"], "--banks sharded: the number of domains in a batch differs from step to step; leave out"),
        (["--static_shapes=true"], "--banks sharded: the number of domains in a batch differs"),
        (["--method=star"], "--banks sharded: Star with sharded banks: "),
        (["--method=multilora", "--backbone=mlp", "--backbone_options.batch_norm=true"], "norms per domain"),
        (["--bank_optimizer=adam"], "--bank_optimizer adam needs a GPU"),
        (
            ["--method=moe_mlora", "--dataset_options.num_domains=6000", "--dataset_options.rows=60000"],
            "'gate' has all 6000 experts on every rank, and more than 5000 are too many; let the gate choose by "
            "domain with --method_options.top_k 4",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_trained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--dataset=synthetic", "--dataset_options.rows=600", "--dataset_options.num_domains=3", "--banks=sharded"]
    assert main([*base, *arguments, f"--output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def chosen(memory: int, domains: int, arguments: list[str]) -> str:
    """Where a run's banks are on ranks of so much memory."""
    from torchrec_mdr.training.experiment import Experiment
    from torchrec_mdr.training.options import parse

    before, bank_choice.rank_memory = bank_choice.rank_memory, lambda _: memory
    try:
        options = parse([*SMALL, f"--dataset_options.num_domains={domains}", *arguments])
        schema_folder = Experiment.prepare_data(options)
        return bank_choice.choose_banks(Experiment.from_options(options, schema_folder), environment())
    finally:
        bank_choice.rank_memory = before


def test_auto_goes_by_memory(one_rank: RankPool) -> None:
    # rank 2 of a -> 8 -> 6, a = 16 dense numbers and products of pairs: in any case more than 100 numbers a domain
    many = 2000 * 100 * 16
    for memory, domains, arguments, expected in (
        (many, 2000, [], "sharded"),
        (1000 * many, 2000, [], "replicated"),
        (many, 500, [], "replicated"),
        (many, 2000, ["--compile=true"], "replicated"),
        (many, 2000, ["--banks=replicated"], "replicated"),
        (1000 * many, 2000, ["--banks=sharded"], "sharded"),
    ):
        assert one_rank.run(chosen, memory, domains, arguments)[0] == expected, (memory, domains, arguments)


def begun_and_resumed(folder: str, memory: int, later: int) -> bool:
    """Whether a run on ranks of some memory, killed and resumed on ranks of another, ends with sharded banks."""
    before = bank_choice.rank_memory, bank_choice.FEW_DOMAINS
    try:
        bank_choice.rank_memory, bank_choice.FEW_DOMAINS = (lambda _: memory), 0
        killed([*SMALL, "--stages.adapt.epochs=2"], folder)
        bank_choice.rank_memory = lambda _: later
        trained([*SMALL, "--stages.adapt.epochs=2", "--resume"], folder)
    finally:
        bank_choice.rank_memory, bank_choice.FEW_DOMAINS = before
    return has_tables(os.path.join(folder, "checkpoints", "adapt"))


@pytest.mark.parametrize("begins_sharded", [True, False])
def test_a_resumed_run_keeps_the_form_it_began_with(begins_sharded: bool, tmp_path: Path, one_rank: RankPool) -> None:
    memory = (1000, 10**12) if begins_sharded else (10**12, 1000)
    assert one_rank.run(begun_and_resumed, str(tmp_path / "run"), *memory)[0] == begins_sharded


def test_adapters_are_handed_over_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "run")
    assert main([*SHARDED, "--stages.adapt.epochs=1", f"--output_dir={folder}"]) == 0
    expected = {adapter.info.domain: adapter for adapter in all_adapters(load_run(folder))}
    read: list[tuple[int, int]] = []
    rows = StoredTensor.rows
    monkeypatch.setattr(StoredTensor, "rows", lambda self, a, b: (read.append((a, b)), rows(self, a, b))[1])
    one = adapter_of_run(folder, "4")
    assert same(one, expected["4"]) and set(read) == {(4, 5)}  # a row of either layer alone
    monkeypatch.setattr(blocks, "PART", 4)
    files = {path.stem: path for path in Path(write_adapters(folder)).glob("*/*.safetensors")}
    assert files.keys() == expected.keys() and len(files) == 6
    assert all(same(read_adapter(str(path)), expected[name]) for name, path in files.items())


def same(one: AdapterFile, other: AdapterFile) -> bool:
    """Whether two adapter files say the same, whatever the order of their heads."""
    names = one.tensors.keys()
    equal = names == other.tensors.keys() and all(torch.equal(one.tensors[n], other.tensors[n]) for n in names)
    return equal and one.info == other.info
