"""A DLRM that trains in a loop of somebody else's gets adapters by the public pieces, on one and two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer

from tests.loop.foreign import (
    CPU,
    DOMAINS,
    STEPS,
    Clicks,
    build_dlrm,
    clicks,
    combined,
    dense_optimizer,
    differing,
    fit,
    shard,
    whole,
)
from tests.ranks import RankPool
from torchrec_mdr import (
    Division,
    MLoRA,
    MoEMLoRA,
    MultiDomainModel,
    MultiDomainTrain,
    MultiLoRA,
    Route,
    backbone_state,
    load_with_new_domains,
    prepare_stage,
)
from torchrec_mdr.methods import Method
from torchrec_mdr.model import parameter_groups
from torchrec_mdr.training.prepared_stage import PreparedStage

Tensors = dict[str, Tensor]


def pretrain(kind: str, folder: str) -> tuple[Tensors, Tensors, tuple[Tensor, ...]]:
    """The plain loop: DLRMTrain, a checkpoint; its state, its fused optimizer's, and what it gives for a batch."""
    torch.manual_seed(1)
    dmp = shard(DLRMTrain(build_dlrm(kind)))
    optimizer = combined(dmp, dense_optimizer(dmp))
    dmp.train()
    fit(dmp, optimizer, [clicks(seed) for seed in range(STEPS)])
    dcp.save({"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    with torch.no_grad():
        _, output = dmp.eval()(clicks(50))
    return whole(dmp.state_dict()), whole(dmp.fused_optimizer.state_dict()["state"]), output


def adapt(kind: str, folder: str, adapted: str, whole_on_meta: bool) -> dict[str, Any]:
    """The page's snippet, with facts taken on the way."""
    plain, plain_fused, plain_output = pretrain(kind, folder)
    torch.manual_seed(2)
    dlrm = build_dlrm(kind, dense_device="meta" if whole_on_meta else "cpu")

    model = MultiDomainModel(dlrm, MLoRA(rank=2), [Division("scenario", DOMAINS)])
    stage = prepare_stage(model, "adapt")
    train_model = MultiDomainTrain(model, domain_ids=lambda batch: batch.scenario)
    dmp = shard(train_model)
    with backbone_state(dmp) as state:
        dcp.load(state, checkpoint_id=folder)
    with torch.no_grad():
        _, output = dmp.eval()(clicks(50))
    with backbone_state(dmp) as state:
        before, before_fused = whole(state["model"]), whole(state["optimizer"]["state"])
    start = whole(dmp.state_dict())
    optimizer = CombinedOptimizer([dmp.fused_optimizer, stage.optimizer(dmp, lr=1e-2)])
    pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU, execute_all_batches=True)
    stage.train(dmp)
    batches = iter([clicks(seed) for seed in range(STEPS)])
    for _ in range(STEPS):
        pipeline.progress(batches)
    dcp.save({"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=adapted)

    with backbone_state(dmp) as state:
        after, after_fused = whole(state["model"]), whole(state["optimizer"]["state"])
    end = whole(dmp.state_dict())
    moved = differing(start, end)
    own = dmp.state_dict()  # sharded collections have buffers of their own beside it
    groups = {name: group.value for name, group in parameter_groups(dmp).items() if name in own}
    return {
        "loaded": not differing(plain, before) and not differing(plain_fused, before_fused),
        "same outputs": all(torch.equal(one, other) for one, other in zip(plain_output, output, strict=True)),
        "kept": not differing(before, after) and not differing(before_fused, after_fused),
        "moved": moved,
        "absent": [bool((start[name] != end[name]).flatten(1).any(1)[-1]) for name in moved],
        "finite": all(bool(tensor.isfinite().all()) for tensor in end.values()),
        "groups": groups,
        "end": end,
    }


@pytest.mark.parametrize(
    ("kind", "ranks", "whole_on_meta"),
    [("dlrm", 1, False), ("dlrm", 2, False), ("dcn", 2, False), ("projection", 1, True), ("projection", 2, True)],
)
def test_the_pages_loop(
    kind: str, ranks: int, whole_on_meta: bool, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    pool = one_rank if ranks == 1 else two_ranks
    outcomes = pool.run(adapt, kind, str(tmp_path / "my_dlrm"), str(tmp_path / "adapted"), whole_on_meta)
    for facts in outcomes:
        assert facts["loaded"] and facts["same outputs"] and facts["kept"] and facts["finite"]
        assert facts["moved"] and all(".adapter" in name for name in facts["moved"])
        assert not any(facts["absent"]), "a domain that was never there has moved"
        tables = {name for name, group in facts["groups"].items() if group == "embeddings"}
        assert {name.split(".")[-2] for name in tables} == {"t_user", "t_item", "t_scenario"}
    adapters = [{n: t for n, t in facts["end"].items() if ".adapter" in n} for facts in outcomes]
    assert not differing(adapters[0], adapters[-1]), "ranks agree"
    # saved by one number of ranks, loaded by another, into more domains
    other = two_ranks if ranks == 1 else one_rank
    for old, new in other.run(load_more, kind, str(tmp_path / "adapted")):
        assert not differing({name: tensor for name, tensor in adapters[0].items() if name in old}, old)
        assert all(torch.equal(new[name][[3, 1]], old[name][[0, 2]]) for name in old), "matched by name"
        assert all(not new[name][[0, 2, 4]].any() for name in new if name.endswith(("lora_B", "bias")))


def load_more(kind: str, adapted: str) -> tuple[Tensors, Tensors]:
    """The adapters of a model with the checkpoint's domains, and of one with others, two of which it knows by name."""
    names = ["a", "b", "c", "d"]
    found = []
    for mine in (names, ["x", "c", "y", "a", "z"]):
        model = MultiDomainModel(build_dlrm(kind), MLoRA(rank=2), [Division("scenario", names=mine)])
        prepare_stage(model, "adapt")
        dmp = shard(MultiDomainTrain(model, "scenario"))
        load_with_new_domains(dmp, adapted, prefix="model.", old_divisions=[Division("scenario", names=names)])
        found.append({name: tensor for name, tensor in whole(dmp.state_dict()).items() if ".adapter" in name})
    return found[0], found[1]


def more_by_place(adapted: str) -> list[bool]:
    """Whether three domains of a checkpoint without names are the first of five."""
    folder = adapted
    rows = []
    for size in (3, 5):
        torch.manual_seed(size)
        model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", size)])
        prepare_stage(model, "adapt")
        dmp = shard(MultiDomainTrain(model, "scenario"))
        if size == 3:
            dcp.save({"model": dmp.state_dict()}, checkpoint_id=folder)
        else:
            load_with_new_domains(dmp, folder, prefix="model.")
        rows.append(model.get_parameter("backbone.over_arch.model.0._mlp.0._linear.adapter.lora_A").detach().clone())
    return [torch.equal(rows[0], rows[1][:3]), bool(rows[1][3:].isfinite().all())]


def test_without_names_domains_are_matched_by_place(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(more_by_place, str(tmp_path / "adapted")) == [[True, True]] * 2


def stages_of(method: Method, divisions: int, folder: str) -> list[tuple[str, set[str], set[str]]]:
    """Runs all stages of a method, each a model built anew; for each, what kinds of tensors moved, and which others."""
    seen = []
    all_divisions = [Division("scenario", DOMAINS), Division("weekday", 2)][:divisions]
    for number, stage_value in enumerate(method.stages(all_divisions)):
        torch.manual_seed(3)
        model = MultiDomainModel(build_dlrm(), method, all_divisions)
        stage = prepare_stage(model, stage_value.name)
        dmp = shard(MultiDomainTrain(model, domain_ids=lambda batch: ids_of(batch, divisions)))
        if number:
            dcp.load({"model": dmp.state_dict()}, checkpoint_id=f"{folder}/{number - 1}")
            stage.start()
        start = whole(dmp.state_dict())
        optimizer = combined(dmp, stage.optimizer(dmp, lr=1e-2))
        stage.train(dmp)
        for expert_index in range(stage_value.expert_passes):
            stage.choose_expert(expert_index)
            fit(dmp, optimizer, [clicks(seed) for seed in range(2)])
        dcp.save({"model": dmp.state_dict()}, checkpoint_id=f"{folder}/{number}")
        moved = differing(start, whole(dmp.state_dict()))
        groups = {name: group.value for name, group in parameter_groups(dmp).items()}
        seen.append((stage_value.name, {groups[name.split("@")[0]] for name in moved}, moved))
    return seen


def ids_of(batch: Clicks, divisions: int) -> Tensor:
    """The scenario, and another division's domains made of it."""
    return torch.stack([batch.scenario, batch.scenario % 2], 1)[:, :divisions]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("method", "divisions"),
    [
        (MultiLoRA(rank=2), 2),
        (MoEMLoRA(rank=2, experts_per_domain=2), 1),
        (MoEMLoRA(rank=2, gate_start="own"), 1),
    ],
    ids=["multilora", "moe_mlora", "moe_mlora_own"],
)
def test_all_stages_of_a_method(
    method: Method, divisions: int, ranks: int, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    for seen in (one_rank if ranks == 1 else two_ranks).run(stages_of, method, divisions, str(tmp_path)):
        kinds = {name: kinds for name, kinds, _ in seen}
        assert kinds.pop("pretrain") == {"embeddings", "backbone"}
        assert kinds.pop("fuse" if divisions == 2 else "gate") == {"gate"}
        assert all(moved == {"adapters"} for moved in kinds.values()) and kinds
        for name, _, moved in seen:
            if name.startswith("adapt_"):
                assert all(f".banks.{name == 'adapt_weekday':d}." in tensor for tensor in moved)


def falls_back(folder: str) -> list[bool]:
    """The start of a stage of gates, and what becomes of it in training and through a checkpoint."""
    method, divisions = MoEMLoRA(rank=2, gate_start="own"), [Division("scenario", DOMAINS)]
    dmps, stages = [], []
    for _ in range(2):
        torch.manual_seed(3)
        model = MultiDomainModel(build_dlrm(), method, divisions)
        stages.append(prepare_stage(model, "gate"))
        dmps.append(shard(MultiDomainTrain(model, "scenario")))
    for name, tensor in dmps[0].state_dict().items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(4))  # what an adapt stage learned
    (first, second), batch = stages, clicks(0)

    def logits(stage: PreparedStage, dmp: nn.Module, route: Route) -> Tensor:
        dmp.eval()
        with torch.no_grad(), stage.model.routed(route):
            return dmp(batch)[1][1].clone()

    drawn, own = (logits(first, dmps[0], route) for route in (Route.FUSED, Route.DOMAIN))
    first.start()
    found = [torch.allclose(logits(first, dmps[0], Route.FUSED), own), not torch.allclose(own, drawn)]
    dcp.save({"model": dmps[0].state_dict()}, checkpoint_id=f"{folder}/own")
    dmps[0].train()  # or first.train(dmps[0])
    found.append(torch.equal(logits(first, dmps[0], Route.FUSED), drawn))
    dcp.load({"model": dmps[1].state_dict()}, checkpoint_id=f"{folder}/own")
    found.append(torch.allclose(logits(second, dmps[1], Route.FUSED), own))
    return found


def test_a_gate_falls_back_on_the_own_experts(one_rank: RankPool, two_ranks: RankPool, tmp_path: Path) -> None:
    for place, pool in enumerate((one_rank, two_ranks)):
        assert all(all(found) for found in pool.run(falls_back, str(tmp_path / str(place))))


def expert_of(others_changed: bool) -> Tensors:
    """Domain 1's experts after training, where other domains' labels may be turned round."""
    torch.manual_seed(4)
    model = MultiDomainModel(build_dlrm(), MoEMLoRA(rank=2), [Division("scenario", DOMAINS)])
    stage = prepare_stage(model, "adapt")
    assert model.router.route is Route.DOMAIN
    dmp = shard(MultiDomainTrain(model, "scenario"))
    batches = [clicks(seed) for seed in range(STEPS)]
    if others_changed:
        for batch in batches:
            batch.labels = torch.where(batch.scenario == 1, batch.labels, 1 - batch.labels)
    stage.train(dmp)
    fit(dmp, combined(dmp, stage.optimizer(dmp, lr=1e-2, max_norm=0.05)), batches)
    return {name: t[:3] for name, t in whole(dmp.state_dict()).items() if ".bank." in name}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_domains_expert_does_not_see_other_domains(ranks: int, one_rank: RankPool, two_ranks: RankPool) -> None:
    """On the route of the stage, and with each domain's gradients clipped by their own norm."""
    pool = one_rank if ranks == 1 else two_ranks
    for ours, theirs in zip(pool.run(expert_of, False), pool.run(expert_of, True), strict=True):
        assert all(torch.equal(tensor[1], theirs[name][1]) for name, tensor in ours.items())
        assert not torch.equal(ours[next(iter(ours))][0], theirs[next(iter(ours))][0])


def refusals() -> list[str]:
    """What is said where a stage is prepared too late, and by name of no stage."""
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", DOMAINS)])
    prepare_stage(model, "pretrain")
    dmp = shard(MultiDomainTrain(model, "scenario"))
    said = []
    for target, name in ((model, "adapt"), (dmp, "adapt")):
        try:
            prepare_stage(target, name)
        except ValueError as error:
            said.append(str(error))
    return said


def test_the_stage_of_a_live_model_is_refused(one_rank: RankPool, two_ranks: RankPool) -> None:
    for said in (*one_rank.run(refusals), *two_ranks.run(refusals)):
        assert len(said) == 2 and all("build the model anew" in sentence for sentence in said)
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", DOMAINS)])
    with pytest.raises(ValueError, match="MLoRA has no stage 'fuse'; its stages are pretrain, adapt"):
        prepare_stage(model, "fuse")
    with pytest.raises(ValueError, match="takes a MultiDomainModel, not a DLRMTrain"):
        prepare_stage(DLRMTrain(build_dlrm()), "adapt")  # type: ignore[arg-type]


def plain_file(path: str) -> list[Any]:
    """A backbone's plain file, into a sharded wrapped model; and what is wrong with one of another shape."""
    torch.manual_seed(5)
    dlrm = build_dlrm(device="cpu")
    torch.save(dlrm.state_dict(), f"{path}.{torch.distributed.get_rank()}")
    loaded = torch.load(f"{path}.{torch.distributed.get_rank()}", weights_only=True)
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", DOMAINS)])
    prepare_stage(model, "adapt")
    dmp = shard(MultiDomainTrain(model, "scenario"))
    with backbone_state(dmp) as state:
        state["model"].update(loaded)
    with torch.no_grad():
        logits = dmp.eval()(clicks(50))[1][1]
        batch = clicks(50)
        expected = dlrm(batch.dense_features, batch.sparse_features).squeeze(-1)
    loaded["over_arch.model.0._mlp.0._linear.weight"] = torch.zeros(3, 3)
    try:
        with backbone_state(dmp) as state:
            state["model"].update(loaded)
    except ValueError as error:
        return [torch.allclose(logits, expected, atol=1e-6), str(error)]
    return []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plain_file_of_the_backbone(ranks: int, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path) -> None:
    for same, sentence in (one_rank if ranks == 1 else two_ranks).run(plain_file, str(tmp_path / "dlrm.pt")):
        assert same
        assert "'over_arch.model.0._mlp.0._linear.weight' is [3, 3] in what is loaded" in sentence
