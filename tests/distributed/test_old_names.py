"""Checkpoints of before: the names and forms that tensors had then, written out here once more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed.stage_runs import ADAM, EVERYTHING, ROWWISE, Job, jobs, make_runtime, whole
from tests.helpers import build_backbone, randomise
from tests.ranks import RankPool
from torchrec_mdr.adapters.domain_module import ParameterGroup
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.baselines import Star
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.old_names import converted_sizes, old_tensors
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.new_domains import load_with_new_domains

State = dict[str, Tensor]


def as_before(state: State) -> State:
    """A model's tensors as they were saved: B and b in one, A and the gate's embedding under other names."""
    old: State = {}
    for name, tensor in state.items():
        holder, _, last = name.rpartition(".")
        if last == "lora_A":
            old[f"{holder}.A"] = tensor
            below = state[f"{holder}.bias"].unsqueeze(1)
            old[f"{holder}.Bb"] = torch.cat([state[f"{holder}.lora_B"].mT, below], 1).contiguous()
        elif last == "domain_embedding":
            old[f"{holder}.domains"] = tensor
        elif f"{holder}.lora_A" not in state or last not in ("lora_B", "bias"):
            old[name] = tensor
    return old


def save_as_before(job: Job, folder: str) -> State:
    """Saves a job's random model; gives its tensors."""
    state = whole(make_runtime(job).state(EVERYTHING))
    checkpoint.save(folder, as_before(state), {})
    return state


def load_anew(job: Job, folder: str) -> tuple[State, State]:
    """A fresh model's tensors before and after loading."""
    runtime = make_runtime(job)
    randomise(runtime.state(EVERYTHING - {ParameterGroup.EMBEDDINGS}), seed=9)
    state = runtime.state(EVERYTHING)
    before = whole(state)
    checkpoint.load(folder, state)
    return before, whole(runtime.state(EVERYTHING))


METHODS: dict[str, tuple[Method, str]] = {
    "mlora": (MLoRA(rank=2), "dlrm_dcn"),
    "multilora": (MultiLoRA(rank=2), "mlp"),
    "moe_mlora": (MoEMLoRA(rank=2, experts_per_domain=2, per_layer=True), "mlp"),
    "star": (Star(), "mlp"),  # whose tensor `domains` keeps its name
}


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_before_loads(name: str, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    method, backbone = METHODS[name]
    job, folder = jobs(method, backbone, embeddings=ADAM)[-1], str(tmp_path / "old")
    (saved,) = one_rank.run(save_as_before, job, folder)
    written = FileSystemReader(folder).read_metadata().state_dict_metadata
    old = {entry.rpartition(".")[2] for entry in written}
    assert ("Bb" in old) == (name != "star") and not {"lora_A", "lora_B", "domain_embedding"} & old
    assert {entry: tuple(size) for entry, (size, _) in checkpoint.stored_sizes(folder).items()} == {
        entry: tuple(tensor.shape) for entry, tensor in saved.items()
    }
    for before, after in two_ranks.run(load_anew, replace(job, embeddings=ROWWISE), folder):
        assert set(after) == set(saved)
        assert all(torch.equal(after[entry], tensor) for entry, tensor in saved.items())
        assert all(not torch.equal(before[entry], saved[entry]) for entry in saved if "lora" in entry)


def grow(method: Method, folder: str) -> tuple[State, State, State]:
    """The tensors of a model of 3 domains, those of a fresh one of 4, and the latter's once it has loaded the first."""
    torch.manual_seed(4)
    small, large = (
        MultiDomainModel(materialize_tables(build_backbone("mlp")), method, [Division("scenario", number)])
        for number in (3, 4)
    )
    randomise(small.state_dict())
    checkpoint.save(folder, as_before(small.state_dict()), {})
    fresh = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    load_with_new_domains(large, folder)
    return dict(small.state_dict()), fresh, dict(large.state_dict())


@pytest.mark.parametrize("experts", [1, 2])
def test_a_checkpoint_of_before_loads_into_a_model_of_more_domains(
    experts: int, tmp_path: Path, one_rank: RankPool
) -> None:
    old, fresh, new = one_rank.run(grow, MoEMLoRA(rank=2, experts_per_domain=experts), str(tmp_path / "old"))[0]
    adapters = [name for name in new if ".adapter.bank." in name]
    assert {name.rpartition(".")[2] for name in adapters} == {"lora_A", "lora_B", "bias"}
    for name in adapters:
        rows, before, start = (t[name].unflatten(0, (experts, -1)) for t in (new, old, fresh))
        assert torch.equal(rows[:, :3], before) and torch.equal(rows[:, 3], start[:, 3]), name
        assert start[:, 3].any() == name.endswith("lora_A")  # the new domain's adapters add nothing
    (embedding,) = (name for name in new if name.endswith("domain_embedding"))
    assert torch.equal(new[embedding][:3], old[embedding])
    torch.testing.assert_close(new[embedding][3], old[embedding].mean(0))


def test_names_of_today_are_left_alone() -> None:
    sizes = {name: (torch.Size([3, 2]), torch.float32) for name in ("adapter.lora_A", "auxiliary.domains", "f.bias")}
    assert old_tensors(sizes) == {} and converted_sizes(sizes) == sizes


def test_a_users_own_tensor_keeps_its_name() -> None:
    sizes = {name: (torch.Size([3, 2, 4]), torch.float32) for name in ("backbone.state_space.A", "over.Bb", "A")}
    assert old_tensors(sizes) == {} and converted_sizes(sizes) == sizes
