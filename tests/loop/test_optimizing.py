"""The stage's optimizer in loops that accumulate, clip, schedule and save; what other optimizers lose."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer

from tests.loop.foreign import DOMAINS, Clicks, build_dlrm, clicks, combined, differing, fit, shard, whole
from tests.ranks import RankPool
from torchrec_mdr import Division, MLoRA, MultiDomainModel, MultiDomainTrain, PreparedStage, prepare_stage

Tensors = dict[str, Tensor]
EACH_RANKS = pytest.mark.parametrize("ranks", [1, 2])


def start(**options: Any) -> tuple[PreparedStage, DistributedModelParallel]:
    """A model in its adapt stage, in training mode; the same adapters on every rank, of which none adds zero."""
    torch.manual_seed(6)
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2), [Division("scenario", DOMAINS)])
    stage = prepare_stage(model, "adapt")
    dmp = shard(MultiDomainTrain(model, "scenario", **options))
    for index, parameter in enumerate(p for bank in stage.banks.values() for p in bank.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    stage.train(dmp)
    return stage, dmp


def of(batch: Clicks, domain: int) -> Clicks:
    """The batch as if all its rows were one domain's."""
    return Clicks(batch.dense_features, batch.sparse_features, batch.labels, torch.full_like(batch.scenario, domain))


def adapters(dmp: DistributedModelParallel) -> Tensors:
    return {name: tensor for name, tensor in whole(dmp.state_dict()).items() if ".adapter" in name}


def accumulate() -> dict[str, bool]:
    """Two micro-batches of different domains, a pass without gradients, one step."""
    stage, dmp = start()
    optimizer = combined(dmp, stage.optimizer(dmp, lr=1e-2))
    before = adapters(dmp)
    optimizer.zero_grad()
    for domain in (0, 2):
        (dmp(of(clicks(domain), domain))[0] / 2).backward()
    with torch.no_grad():
        dmp(of(clicks(9), 1))
    optimizer.step()
    after = adapters(dmp)
    return {
        name: (before[name] != after[name]).flatten(1).any(1).tolist() == [True, False, True, False] for name in before
    }


@EACH_RANKS
def test_rows_of_all_micro_batches_move(ranks: int, one_rank: RankPool, two_ranks: RankPool) -> None:
    for moved in (one_rank if ranks == 1 else two_ranks).run(accumulate):
        assert len(moved) == 6 and all(moved.values()), moved


def clip() -> tuple[float, float]:
    """The gradients' norm before TorchRec's clipping, and after it."""
    stage, dmp = start()
    inner = stage.optimizer(dmp, lr=1e-2)
    optimizer = combined(dmp, GradientClippingOptimizer(inner, GradientClipping.NORM, max_gradient=1e-3))
    dmp(clicks(0))[0].backward()

    def norm() -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in inner.params.values()]))

    before = norm()
    optimizer.step()
    return before, norm()


@EACH_RANKS
def test_torchrecs_clipping_sees_the_gradients(ranks: int, one_rank: RankPool, two_ranks: RankPool) -> None:
    for before, after in (one_rank if ranks == 1 else two_ranks).run(clip):
        assert before > 2e-3 and after == pytest.approx(1e-3, rel=1e-3)


def schedule_save_and_go_on(folder: str) -> list[set[str]]:
    """A schedule, and a checkpoint that a loop built anew takes up: what differs after the next step, and all names."""
    found = []
    for again in (False, True):
        stage, dmp = start()
        optimizer = combined(dmp, stage.optimizer(dmp, lr=1e-2))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        if again:
            optimizer.init_state()
            optimizer.zero_grad()
            state = {"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}
            dcp.load(state, checkpoint_id=folder)
            optimizer.load_state_dict(state["optimizer"])
        else:
            fit(dmp, optimizer, [clicks(0), clicks(1)])
            dcp.save({"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
        scheduler.step()
        assert {group["lr"] for group in stage_groups(optimizer)} == {5e-3}
        fit(dmp, optimizer, [clicks(2)])
        found.append(whole(dmp.state_dict()) | whole(optimizer.state_dict()["state"]))
    return [differing(*found), set(found[0])]


def stage_groups(optimizer: CombinedOptimizer) -> list[dict[str, Any]]:
    """The parameter groups of the second of the combined optimizers."""
    return list(optimizer.optimizers[1][1].param_groups)  # type: ignore[arg-type]


@EACH_RANKS
def test_a_restarted_loop_goes_on_bitwise(ranks: int, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path) -> None:
    for differences, names in (one_rank if ranks == 1 else two_ranks).run(schedule_save_and_go_on, str(tmp_path / "x")):
        assert not differences
        assert any(name.endswith("adapter.lora_A/exp_avg") for name in names)


def init_state() -> list[bool]:
    """Making the state moves nothing and counts no step, with weight decay and a dense part that trains, too."""
    model = MultiDomainModel(build_dlrm(), MLoRA(rank=2, schedule="joint"), [Division("scenario", DOMAINS)])
    stage = prepare_stage(model, "joint")
    dmp = shard(MultiDomainTrain(model, "scenario"))
    optimizer = stage.optimizer(dmp, lr=1e-2, weight_decay=0.1)
    before = whole(dmp.state_dict())
    optimizer.init_state()
    steps = [entry["step"] for entry in optimizer.state_dict()["state"].values()]
    return [
        not differing(before, whole(dmp.state_dict())),
        not any(step.any() for step in steps),
        {name for name, p in dmp.named_parameters() if p.requires_grad and "embedding_bags" not in name}
        == set(optimizer.state_dict()["state"]),
    ]


def test_the_optimizers_state_can_be_made_before_the_first_step(two_ranks: RankPool) -> None:
    assert two_ranks.run(init_state) == [[True] * 3] * 2


def weigh() -> tuple[float, float, list[Tensor]]:
    """A weighted loss, what it should be, and what DLRMTrain's outputs are made of."""
    weights = [2.0, 0.5, 1.0, 3.0]
    _, dmp = start(domain_weights=weights)
    batch = clicks(3)
    batch.scenario[0] = -1
    loss, (kept, logits, labels) = dmp(batch)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    rows = [1.0 if domain < 0 else weights[domain] for domain in batch.scenario.tolist()]
    assert not kept.requires_grad and torch.equal(labels, batch.labels) and logits.shape == labels.shape
    return float(loss), float((each * torch.tensor(rows)).mean()), [kept, logits]


def test_domains_weigh_in_the_loss(one_rank: RankPool) -> None:
    loss, expected, _ = one_rank.run(weigh)[0]
    assert loss == pytest.approx(expected)


def other_optimizers() -> list[Any]:
    """What is said of each of some optimizers in two steps, and which rows of a bias moved without a gradient."""
    heard = []
    for kind, options in ((torch.optim.Adam, {}), (torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9})):
        _, dmp = start()
        optimizer = kind([p for n, p in dmp.named_parameters() if ".adapter" in n], lr=1e-2, **options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for domain in (0, 1):
                bias = dmp.state_dict()["model.backbone.over_arch.model.0._mlp.0._linear.adapter.bias"].clone()
                optimizer.zero_grad()
                dmp(of(clicks(domain), domain))[0].backward()
                optimizer.step()
        moved = dmp.state_dict()["model.backbone.over_arch.model.0._mlp.0._linear.adapter.bias"][0] != bias[0]
        heard.append(([str(w.message) for w in said if "isolated" in str(w.message)], bool(moved.any())))
    return heard


def test_an_optimizer_that_moves_absent_domains_is_named_once(two_ranks: RankPool) -> None:
    for (adam, adam_moves), (sgd, sgd_moves), (momentum, momentum_moves) in two_ranks.run(other_optimizers):
        assert adam_moves and momentum_moves and not sgd_moves
        assert len(adam) == len(momentum) == 1 and not sgd
        assert "Adam trains adapters with betas" in adam[0] and "SGD trains adapters with momentum" in momentum[0]


def replicas_differ() -> bool:
    """Whether ranks hold different adapters after steps on different rows."""
    stage, dmp = start()
    fit(dmp, combined(dmp, stage.optimizer(dmp, lr=1e-2, max_norm=1e-3)), [clicks(0), clicks(1)])
    mine = torch.cat([tensor.flatten() for tensor in adapters(dmp).values()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    return not torch.equal(mine, theirs)


def test_clipping_keeps_ranks_the_same(two_ranks: RankPool) -> None:
    assert two_ranks.run(replicas_differ) == [False, False]
