from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data import own
from torchrec_mdr import train
from torchrec_mdr.data.schema import SPLITS, Schema
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.training import memory
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.options import parse


@pytest.mark.parametrize(
    ("method", "ids", "domains", "message"),
    [
        (
            "mlora",
            9_000_000_000_000,
            3,
            "576.0 TB in each process, .*: sparse feature 'user' has num_embeddings of 9,0",
        ),
        ("mlora", 2**31 + 10, 3, "take 137.4 GB .* num_embeddings of 2,147,483,658; correct schema.json, hash ids"),
        ("moe_mlora", 12, 300_000, "division 'shop' has 300,000 domains; pool rare ones, as prepare --min_rows does"),
        ("single", 12, 300_000, "and the method has tables for each of 300,000 domains"),
    ],
)
def test_what_is_too_large_ends_in_a_sentence_before_memory_is_taken(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    ids: int,
    domains: int,
    message: str,
) -> None:
    content = own.write(tmp_path / "data", divisions={"shop": domains})
    content["sparse_features"][0]["num_embeddings"] = ids
    (tmp_path / "data" / "schema.json").write_text(json.dumps(content))
    monkeypatch.setattr(memory, "rank_memory", lambda environment: 1 << 30)
    arguments = [f"--dataset={tmp_path}/data/", f"--output_dir={tmp_path}/run", f"--method={method}"]
    assert train.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line) and not (tmp_path / "run").exists()


def refusal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], memory_bytes: int, *options: str
) -> str | None:
    """The sentence that a run of 2,000 domains is refused in before anything is trained; None where it begins."""
    monkeypatch.setattr(memory, "rank_memory", lambda environment: memory_bytes)

    def begins(*arguments: object) -> None:
        raise ValueError("it begins")

    monkeypatch.setattr(train, "check_values", begins)  # the next step of a run
    assert train.main([f"--dataset={folder}/", f"--output_dir={folder}/run", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not (folder / "run").exists()
    return None if "it begins" in line else line


@pytest.mark.parametrize(
    ("options", "least", "message"),
    [
        # a run's peak grew by 7.5 (hamur), 8.5 (star) and 9.8 (finetune) times the weights that domains were added by
        (("--method=hamur",), 1.2e9, "in stage 'train', .* division 'shop' has 2,000 domains; pool rare ones"),
        (("--method=star",), 1.35e9, "in stage 'train', .* division 'shop' has 2,000 domains"),
        (("--method=finetune", "--method_options.embeddings=false"), 1.35e9, "in stage 'adapt'"),
        (("--method=ple",), 2e9, "in stage 'train'"),
        (("--method=moe_mlora", "--method_options.rank=64"), 1.2e9, "in stage 'adapt'"),
    ],
)
def test_what_a_step_takes_beside_the_weights_is_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    least: float,
    message: str,
) -> None:
    own.write(tmp_path / "data", divisions={"shop": 2000})
    refused = [refusal(tmp_path / "data", monkeypatch, capsys, int(size), *options) for size in (least, 3 * least)]
    assert refused[0] is not None and re.search(message, refused[0]) and refused[1] is None


@pytest.mark.parametrize("method", ["ple", "mmoe", "moe_mlora"])
def test_rows_that_go_through_all_domains_parts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """16,384 rows of an evaluation through layers of 256 for each of 300 domains: 10 GB, beside a model of 0.5."""
    own.write(tmp_path / "data", divisions={"shop": 300})
    schema = replace(Schema.load(str(tmp_path / "data")), rows=dict.fromkeys(SPLITS, 100_000))
    options = parse([f"--dataset={tmp_path}/data/", f"--method={method}"])
    experiment = Experiment.of_schema(options, schema, str(tmp_path / "data"))
    monkeypatch.setattr(memory, "rank_memory", lambda environment: 6 * 10**8)
    with pytest.raises(ValueError, match="a batch of 16,384 rows takes .* lower --eval_batch_size, or pool rare ones"):
        memory.check_memory(experiment, Environment(0, 1, torch.device("cpu")))
