"""From a run to a service, by commands alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.inference.models import rows_for
from tests.inference.runs import finished, save
from tests.test_train import SMALL
from torchrec_mdr import adapter, export, merge, train
from torchrec_mdr.adapters import ParameterGroup
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.inference import Run, Scorer, load_run, read_adapter, write_adapters
from torchrec_mdr.inference.hand_over import all_adapters
from torchrec_mdr.inference.run_data import data_of
from torchrec_mdr.model import parameter_groups


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finished(tmp_path / "run", "mlora", "--backbone=dlrm_dcn")


@pytest.fixture
def bundle(run: Run, tmp_path: Path) -> str:
    assert export.main([f"--run={run.folder}", f"--output={tmp_path / 'bundle'}", "--eager", "--calibrate"]) == 0
    return str(tmp_path / "bundle")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_an_adapter_goes_from_a_run_to_a_bundle_and_back(
    run: Run, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = Scorer(bundle, False)
    dense, features, ids = rows_for(run.model, 33)
    first = scorer.score(dense, features, ids).logits
    groups = parameter_groups(run.model)
    with torch.no_grad():  # another training of the adapters
        for name, parameter in run.model.named_parameters():
            if groups[name] is ParameterGroup.ADAPTERS:
                parameter.mul_(1.5)
        wanted = run.model(dense, features, ids).flatten()
    again = tmp_path / "again"
    again.mkdir()
    for name in ("config.yaml", "schema.json"):
        (again / name).write_bytes(Path(run.folder, name).read_bytes())
    save(again, run.experiment, run.model)
    file = str(tmp_path / "cart.safetensors")
    assert adapter.main(["export", f"--run={again}", "--domain=cart", f"--output={file}"]) == 0
    assert adapter.main(["put", file, f"--bundle={bundle}"]) == 0
    assert said(capsys) == "scenario: domain 'cart' is served by version 2"
    mine = ids[:, 0] == 1
    logits = scorer.score(dense, features, ids).logits
    torch.testing.assert_close(logits[mine], wanted[mine], rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[~mine], first[~mine])
    assert adapter.main(["rollback", "cart", f"--bundle={bundle}"]) == 0
    assert torch.equal(scorer.score(dense, features, ids).logits, first)
    assert adapter.main(["pin", "home", f"--bundle={bundle}"]) == 0
    assert adapter.main(["remove", "search", f"--bundle={bundle}"]) == 0
    assert said(capsys) == "scenario: domain 'search' is unknown"
    assert adapter.main(["list", f"--bundle={bundle}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["scenario", "home", "1", "True", "[]"], ["scenario", "cart", "1", "False", "[]"]]
    with pytest.raises(AssertionError):
        assert adapter.main(["rollback", "cart", f"--bundle={bundle}"]) == 0
    assert "error: domain 'cart' has no version before 1" in capsys.readouterr().err


def test_verify_sees_one_changed_byte(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapter.main(["verify", f"--bundle={bundle}"]) == 0
    assert said(capsys) == f"{bundle} is whole"
    for name in ("backbone.safetensors", "adapters/scenario/cart/000001.safetensors"):
        path = Path(bundle, name)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert adapter.main(["verify", f"--bundle={bundle}"]) == 2
    told = capsys.readouterr().err
    assert "is not what was exported" in told and "000001.safetensors is not what was put" in told


def test_a_run_writes_its_adapters_as_files(run: Run) -> None:
    folder = Path(write_adapters(run.folder))
    names = sorted(path.name for path in (folder / "scenario").iterdir())
    assert names == ["cart.safetensors", "home.safetensors", "search.safetensors"]
    written, wanted = read_adapter(str(folder / "scenario" / names[0])), list(all_adapters(run))[1]
    assert written.info == wanted.info
    assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in written.tensors.items())


def test_merged_weights_start_a_plain_backbone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cart.pt"
    assert merge.main([f"--run={run.folder}", "--domain=cart", f"--output={file}"]) == 0
    state = torch.load(file, weights_only=True)
    low = len(state["inter_arch.crossnet.V_kernels.0"])
    backbone = type(run.experiment.backbone)(hidden=(10, 5), dcn_low_rank_dim=low).build(run.schema, 8)
    materialize_tables(backbone).load_state_dict(state)
    dense, features, ids = rows_for(run.model, 9)
    with torch.no_grad():
        wanted = run.model(dense, features, torch.ones_like(ids))
        torch.testing.assert_close(backbone.eval()(dense, features), wanted, rtol=1e-6, atol=1e-6)
    assert merge.main([f"--run={run.folder}", "--domain=till", f"--output={file}"]) == 2
    assert "division 'scenario' has no domain 'till'" in capsys.readouterr().err


def test_what_the_commands_refuse(run: Run, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([f"--run={run.folder}", f"--output={bundle}"], "is in use; name another one"),
        ([f"--output={bundle}"], "give --run, the run to make a bundle of, or --again"),
        ([f"--run={run.folder}", f"--output={tmp_path / 'b'}", "--resident=0"], "--resident must be at least 1"),
        ([f"--run={run.folder}", f"--output={tmp_path / 'b'}", "--adapter_dtype=int4"], "must be float32 or bfloat16"),
        (["--again", f"--output={tmp_path}"], "holds no bundle: it has no manifest.json"),
    ):
        assert export.main(arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.writing").exists()
    star = finished(tmp_path / "star", "star", "--backbone=mlp")
    assert export.main([f"--run={star.folder}", f"--output={tmp_path / 'b'}", "--eager"]) == 2
    assert "Star cannot be served or merged" in capsys.readouterr().err
    mix = finished(tmp_path / "mix", "mix", "--backbone=mlp")
    assert adapter.main(["export", f"--run={mix.folder}", "--domain=cart", f"--output={tmp_path / 'x'}"]) == 2
    assert "Mix gives domains nothing of their own" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"model.pt2 is missing; compile it by .*export --again"):
        Scorer(bundle, compiled=True)
    manifest = Path(bundle, "manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "torchrec_mdr bundle 0"}))
    with pytest.raises(ValueError, match="is of another version, or damaged"):
        Scorer(bundle, False)
    assert load_run(run.folder).folder == run.folder


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["mlora", "multilora", "moe_mlora"])
def test_a_trained_runs_bundle_gives_its_test_auc(tmp_path: Path, monkeypatch: Any, method: str) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path / "cache"))
    folder, bundle = tmp_path / "run", tmp_path / "bundle"
    assert train.main([*SMALL, f"--method={method}", "--adapter_files=true", f"--output_dir={folder}"]) == 0
    run = load_run(str(folder))
    written = {str(path.relative_to(folder / "adapters")) for path in (folder / "adapters").rglob("*.safetensors")}
    assert written == {f"{own.name}/{domain}.safetensors" for own in run.divisions for domain in own.domain_names}
    assert export.main([f"--run={folder}", f"--output={bundle}", "--calibrate"]) == 0
    scorer, experiment = Scorer(str(bundle)), data_of(run)
    found = []
    for batch in experiment.eval_loader("test", Environment(0, 1, torch.device("cpu"))).batches(0):
        scores = scorer.score(batch.dense_features, batch.sparse_features, batch.domains.ids)
        found.append((scores.logits, batch.labels))
    logits, labels = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    wanted = json.loads((folder / "metrics.json").read_text())["test"]["auc"]
    assert roc_auc_score(labels, logits) == pytest.approx(wanted, abs=1e-6)
    assert adapter.main(["verify", f"--bundle={bundle}"]) == 0
    before = scorer.list()
    assert export.main(["--again", f"--output={bundle}"]) == 0
    again = Scorer(str(bundle))
    assert torch.equal(
        again.score(batch.dense_features, batch.sparse_features, batch.domains.ids).logits, scores.logits
    )
    assert again.list() == before
