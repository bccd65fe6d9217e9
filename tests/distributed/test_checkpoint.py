"""Checkpoints: whole or not there, at any world size and sharding, and refused where they do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tests.distributed.stage_runs import (
    ADAM,
    EVERYTHING,
    ROWWISE,
    Job,
    batches,
    jobs,
    make_runtime,
    some_rows,
    train,
    whole,
)
from tests.helpers import DIM, build_backbone, randomise
from tests.ranks import RankPool
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint, checkpoint_writer
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import MLoRA, MultiLoRA
from torchrec_mdr.storage import write_json

ROW_WISE = EmbeddingConfig(dim=DIM, optimizer="rowwise_adagrad", sharding="row_wise")
COLUMN_WISE = EmbeddingConfig(dim=DIM, optimizer="sgd", sharding="column_wise")
JOB = jobs(MultiLoRA(rank=2), "mlp")[0]


def train_and_save(job: Job, folder: str) -> dict[str, Tensor]:
    runtime = make_runtime(job)
    list(runtime.train(batches(job, some_rows(2))))
    checkpoint.save(folder, runtime.state(EVERYTHING), {"stage": job.stage.name})
    return whole(runtime.state(EVERYTHING))


def load_anew(job: Job, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    runtime = make_runtime(job)
    before = whole(runtime.state(EVERYTHING))
    checkpoint.load(folder, runtime.state(EVERYTHING))
    return before, whole(runtime.state(EVERYTHING))


@pytest.mark.parametrize(
    ("saved_by", "saved_as", "loaded_by", "loaded_as"),
    [(2, ROW_WISE, 1, ADAM), (1, ADAM, 2, ROWWISE), (2, ROWWISE, 2, COLUMN_WISE)],
    ids=["2-rowwise-to-1-dataparallel", "1-dataparallel-to-2-mixed", "2-mixed-to-2-columnwise"],
)
def test_a_checkpoint_loads_at_any_world_size_and_sharding(
    saved_by: int,
    saved_as: EmbeddingConfig,
    loaded_by: int,
    loaded_as: EmbeddingConfig,
    tmp_path: Path,
    one_rank: RankPool,
    two_ranks: RankPool,
) -> None:
    pools, folder = {1: one_rank, 2: two_ranks}, str(tmp_path / "stage")
    saved = pools[saved_by].run(train_and_save, replace(JOB, embeddings=saved_as), folder)[0]
    for before, after in pools[loaded_by].run(load_anew, replace(JOB, embeddings=loaded_as), folder):
        assert set(after) == set(saved)
        assert all(torch.equal(after[name], tensor) for name, tensor in saved.items())
        assert any(not torch.equal(before[name], tensor) for name, tensor in saved.items())
    assert checkpoint.read_info(folder) == {"stage": "pretrain"}
    assert os.listdir(tmp_path) == ["stage"]


def resume(job: Job, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps, a checkpoint of model and optimizer, two more steps: by the same runtime, and by a new one."""
    runtime, steps = make_runtime(job), some_rows(4)
    list(runtime.train(batches(job, steps[:2])))
    state = {f"model/{name}": tensor for name, tensor in runtime.state(EVERYTHING).items()}
    state |= {f"optimizer/{name}": tensor for name, tensor in runtime.optimizer_tensors().items()}
    checkpoint.save(folder, state, {})
    list(runtime.train(batches(job, steps[2:])))
    first = whole(runtime.state(EVERYTHING)) | whole(runtime.optimizer_tensors())

    runtime = make_runtime(job)
    state = {f"model/{name}": tensor for name, tensor in runtime.state(EVERYTHING).items()}
    state |= {f"optimizer/{name}": tensor for name, tensor in runtime.fused_tensors().items()}
    checkpoint.load(folder, state)
    tensors = checkpoint.load_new(folder, "optimizer/", torch.device("cpu"))
    runtime.stage_optimizer.restore({name: t for name, t in tensors.items() if not name.startswith("fused/")})
    list(runtime.train(batches(job, steps[2:])))
    return first, whole(runtime.state(EVERYTHING)) | whole(runtime.optimizer_tensors())


@pytest.mark.parametrize("embeddings", [ADAM, ROWWISE], ids=["adam", "rowwise_adagrad"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_state_of_optimizers_travels_with_the_model(
    stage: int, embeddings: EmbeddingConfig, tmp_path: Path, two_ranks: RankPool
) -> None:
    job = jobs(MultiLoRA(rank=2), "mlp", embeddings=embeddings)[stage]
    for once, resumed in two_ranks.run(resume, job, str(tmp_path / "step")):
        assert set(once) == set(resumed)
        assert all(torch.equal(once[name], tensor) for name, tensor in resumed.items())


def message_of(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool) -> str:
    folder = str(tmp_path_factory.mktemp("checkpoints") / "pretrain")
    one_rank.run(train_and_save, JOB, folder)
    return folder


def test_another_model_or_division_is_refused(saved: str, one_rank: RankPool) -> None:
    def message(job: Job) -> str:
        return one_rank.run(message_of, load_anew, job, saved)[0]

    assert message(JOB) == "no error"
    assert "is of another model: it lacks 'backbone." in message(replace(JOB, backbone="dlrm"))
    assert "is of another model: it lacks 'backbone." in message(jobs(MLoRA(rank=2), "mlp")[0])
    wider = replace(JOB, divisions=(Division("scenario", 4), Division("gender", 2)))
    assert "is of another model or division: 'backbone.over_arch.hidden.0.linear.adapter.banks.0" in message(wider)
    assert "is [3, 10] there and [4, 10] here" in message(wider)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_file_is_named(
    share: float, ranks: int, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    folder = tmp_path / "pretrain"
    one_rank.run(train_and_save, JOB, str(folder))
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: int(data.stat().st_size * share)])
    for message in (one_rank if ranks == 1 else two_ranks).run(message_of, load_anew, JOB, str(folder)):
        assert f"{data} is damaged: it is " in message
        assert "\n" not in message and "CheckpointException" not in message


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, one_rank: RankPool) -> None:
    assert "is no readable distributed checkpoint" in one_rank.run(message_of, load_anew, JOB, str(tmp_path))[0]
    with pytest.raises(ValueError, match=r"is no checkpoint of a stage: stage\.json cannot be read"):
        checkpoint.read_info(str(tmp_path))
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    (tmp_path / "stage.json").write_text("{")
    assert "is no readable distributed checkpoint" in one_rank.run(message_of, load_anew, JOB, str(tmp_path))[0]
    with pytest.raises(ValueError, match=r"stage\.json cannot be read"):
        checkpoint.read_info(str(tmp_path))


def save_until(step: str, folder: str, value: float) -> None:
    """Saves a tensor, but is interrupted at one of the steps on the way."""

    target, name = {"tensors": (dcp, "save"), "info": (checkpoint_writer, "write_json"), "rename": (os, "rename")}[step]
    before = getattr(target, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if step != "rename" or args[1] == folder:  # DCP renames its own files
            raise KeyboardInterrupt
        return before(*args, **kwargs)

    setattr(target, name, interrupted)
    try:
        checkpoint.save(folder, {"t": torch.tensor([value])}, {"value": value})
    except KeyboardInterrupt:
        return
    finally:
        setattr(target, name, before)


def save_value(folder: str, value: float) -> None:
    checkpoint.save(folder, {"t": torch.tensor([value])}, {"value": value})


def load_value(folder: str) -> float:
    state = {"t": torch.zeros(1)}
    checkpoint.load(folder, state)
    assert state["t"].item() == checkpoint.read_info(folder)["value"]
    return state["t"].item()


@pytest.mark.parametrize("step", ["tensors", "info", "rename"])
def test_an_interrupted_save_leaves_no_folder_of_that_name(step: str, tmp_path: Path, one_rank: RankPool) -> None:
    folder = str(tmp_path / "stage")
    one_rank.run(save_until, step, folder, 1.0)
    assert not os.path.exists(folder)
    one_rank.run(save_value, folder, 2.0)
    assert one_rank.run(load_value, folder) == [2.0] and os.listdir(tmp_path) == ["stage"]


@pytest.mark.parametrize("step", ["tensors", "info"])
def test_an_older_checkpoint_stays_until_the_new_one_is_written(step: str, tmp_path: Path, one_rank: RankPool) -> None:
    folder = str(tmp_path / "stage")
    one_rank.run(save_value, folder, 2.0)
    one_rank.run(save_until, step, folder, 3.0)
    assert one_rank.run(load_value, folder) == [2.0]


def test_json_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    write_json(str(path), {"a": 1})
    with pytest.raises(TypeError):
        write_json(str(path), {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def backbone_file(path: Path) -> nn.Module:
    backbone = materialize_tables(build_backbone("mlp"))
    randomise(backbone.state_dict(), seed=5)
    torch.save(backbone.state_dict(), path)
    return backbone


def load_backbone(job: Job, path: str) -> dict[str, Tensor]:
    runtime = make_runtime(job)
    plain = dict(build_backbone("mlp").state_dict())
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in runtime.state(EVERYTHING).items()
        if name.removeprefix("backbone.") in plain
    }
    checkpoint.load_state_dict_file(path, state)
    return {name.removeprefix("backbone."): tensor for name, tensor in whole(runtime.state(EVERYTHING)).items()}


@pytest.mark.parametrize("embeddings", [ADAM, ROWWISE, COLUMN_WISE], ids=["dataparallel", "mixed", "columnwise"])
def test_a_backbones_state_dict_file_loads_into_every_sharding(
    embeddings: EmbeddingConfig, tmp_path: Path, two_ranks: RankPool
) -> None:
    backbone = backbone_file(tmp_path / "backbone.pt")
    for loaded in two_ranks.run(load_backbone, replace(JOB, embeddings=embeddings), str(tmp_path / "backbone.pt")):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("over_arch.output.bias"), "it lacks 'over_arch.output.bias' .1 missing, 0 unknown."),
        (lambda s: s.update(more=torch.ones(1)), "it has 'more', which this backbone has not .0 missing, 1 unknown."),
        (
            lambda s: s.update({"over_arch.output.weight": torch.ones(1, 4)}),
            r"'over_arch.output.weight' is \[1, 4\] there, \[1, 5\] here",
        ),
        (lambda s: s.update(epoch=3), "it holds no dictionary of tensors"),
    ],
    ids=["missing", "extra", "shape", "no tensor"],
)
def test_a_state_dict_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    backbone = materialize_tables(build_backbone("mlp"))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    torch.save(state, tmp_path / "backbone.pt")
    with pytest.raises(ValueError, match=message):
        checkpoint.load_state_dict_file(str(tmp_path / "backbone.pt"), backbone.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("content", [None, b"no zip file", [torch.ones(1)], nn.Linear(1, 1)])
def test_what_is_no_state_dict_file_is_named(content: object, tmp_path: Path) -> None:
    path = tmp_path / "backbone.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)  # a whole module is a pickle, which is not run
    with pytest.raises(ValueError, match=r"backbone\.pt is no state_dict file") as error:
        checkpoint.load_state_dict_file(str(path), {})
    assert "\n" not in str(error.value)


def save_on_one_rank_alone(folder: str) -> list[str]:
    """Plain tensors are written once, whatever the number of ranks."""
    checkpoint.save(folder, {"t": torch.full((2,), float(dist.get_rank()))}, {})
    return sorted(os.listdir(folder))


def test_plain_tensors_are_written_once(tmp_path: Path, two_ranks: RankPool) -> None:
    folder = str(tmp_path / "stage")
    first, second = two_ranks.run(save_on_one_rank_alone, folder)
    assert first == second and ".metadata" in first and "stage.json" in first
    assert checkpoint.stored_sizes(folder) == {"t": (torch.Size([2]), torch.float32)}


def test_training_goes_on_from_nothing_but_the_seed(one_rank: RankPool) -> None:
    """What resuming is compared with: a job gives the same bitwise twice."""
    first, second = (one_rank.run(train, JOB, some_rows(2))[0] for _ in range(2))
    assert all(torch.equal(tensor, second.after[name]) for name, tensor in first.after.items())
