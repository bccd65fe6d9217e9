from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.test_train import SMALL
from torchrec_mdr.data.loader import DomainLoader
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.inference import Run, load_run
from torchrec_mdr.prepare import main as prepare_data
from torchrec_mdr.prepare import prepare
from torchrec_mdr.train import main


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def train(folder: Path, *given: str) -> None:
    assert main([*SMALL, "--stages.pretrain.epochs=1", *given, f"--output_dir={folder}"]) == 0


def scores(run: Run) -> tuple[np.ndarray, np.ndarray]:
    data = prepare("synthetic", rows=6000, num_domains=4)
    names = [division.name for division in run.divisions]
    found = []
    with torch.no_grad():
        for batch in DomainLoader(data, run.schema, "test", names, 500).batches(0):
            logits = run.model(batch.dense_features, batch.sparse_features, batch.domains.ids).flatten()
            found.append((logits.numpy(), batch.labels.numpy()))
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])


# backbones with index buffers, averaged weights, tables with a part per domain
@pytest.mark.parametrize(
    ("given", "last"),
    [
        (["--method=mlora", "--backbone=dlrm", "--stages.adapt.ema_decay=0.9"], "adapt"),
        (["--method=multilora", "--backbone=pnn"], "fuse"),
        (["--method=moe_mlora", "--backbone=fibinet", "--embeddings.optimizer=rowwise_adagrad"], "gate"),
        (["--method=single", "--backbone=mlp", "--backbone_options.batch_norm=true"], "train"),
    ],
)
def test_the_model_is_the_one_that_was_tested(tmp_path: Path, given: list[str], last: str) -> None:
    train(tmp_path / "run", *given)
    before = torch.random.get_rng_state()
    run = load_run(str(tmp_path / "run"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not run.model.training
    stored = checkpoint.load_new(str(tmp_path / "run" / "checkpoints" / last), "", torch.device("cpu"))
    state = run.model.state_dict()
    assert set(state) == set(stored)
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    logits, labels = scores(run)
    wanted = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["auc"]
    assert roc_auc_score(labels, logits) == pytest.approx(wanted, abs=1e-6)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", "--method=mlora")
    for broken, words in (
        ("config.yaml", "it has no config.yaml; name the --output_dir"),
        ("schema.json", "it has no schema.json; copy that of its data set"),
        ("checkpoints/adapt", "stage 'adapt' has no checkpoint; end it with --resume"),
    ):
        folder = tmp_path / broken.replace("/", ".")
        shutil.copytree(tmp_path / "run", folder)
        path = folder / broken
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(ValueError, match=words):
            load_run(str(folder))
    schema = tmp_path / "run" / "schema.json"
    schema.write_text(schema.read_text().replace('"num_domains": 4', '"num_domains": 5'))
    with pytest.raises(ValueError, match=r"schema.json is damaged: it is not what was written"):
        load_run(str(tmp_path / "run"))
    (tmp_path / "run" / "digests.json").unlink()
    with pytest.raises(ValueError, match="is the checkpoint of another run"):
        load_run(str(tmp_path / "run"))


def test_a_run_goes_on_with_its_own_data_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, command = tmp_path / "data", ["--method=mix", "--stages.joint.epochs=1", f"--output_dir={tmp_path / 'run'}"]
    for domains, code in ((4, 0), (5, 2)):
        shutil.rmtree(data, ignore_errors=True)
        options = ["--dataset=synthetic", "--synthetic.rows=900", f"--synthetic.num_domains={domains}"]
        assert prepare_data([*options, f"--output={data}"]) == 0
        assert main([*command, f"--dataset={data}/", "--resume=auto", "--stage=train"]) == code
    assert "was made on other data: its schema.json is not that of" in capsys.readouterr().err
