"""What models of one's own do: sequences, checkpointed activations, copies, threads, norms and dropout."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchrec.distributed import TrainPipelineBase
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRMTrain

from tests.helpers import low_rank_rows, randomise
from tests.loop.foreign import CPU, DOMAINS, Clicks, build_dlrm, clicks, combined, differing, shard, whole
from tests.loop.own_model import LENGTH, TARGETS, OwnModel
from tests.ranks import RankPool
from torchrec_mdr import Division, MLoRA, MoEMLoRA, MultiDomainModel, MultiDomainTrain, MultiLoRA, Route, prepare_stage

SCENARIO = [Division("scenario", DOMAINS)]
METHODS = {"mlora": MLoRA(rank=2), "multilora": MultiLoRA(rank=2), "moe_mlora": MoEMLoRA(rank=2)}
METHODS["moe_mlora_top_k"] = MoEMLoRA(rank=2, top_k=2)


def build(method: str = "mlora", recompute: bool | None = None, targets: list[str] | None = None) -> MultiDomainModel:
    """An unsharded model whose adapters do something."""
    torch.manual_seed(0)
    divisions = [*SCENARIO, Division("weekday", 2)] if method == "multilora" else SCENARIO
    model = MultiDomainModel(OwnModel(recompute), METHODS[method], divisions, targets or TARGETS)
    randomise({name: tensor for name, tensor in model.named_parameters() if ".adapter" in name})
    return model


def call(model: nn.Module, batch: Clicks) -> Tensor:
    ids = batch.scenario
    inner = model.module if isinstance(model, AveragedModel) else model
    if len(inner.divisions) == 2:
        ids = torch.stack([ids, ids % 2], 1)
    logits: Tensor = model(batch.dense_features, batch.sparse_features, ids)
    return logits


def by_rows(model: MultiDomainModel, batch: Clicks) -> Tensor:
    """MLoRA in evaluation mode, one row after the other."""
    own, ids = model.backbone, batch.scenario

    def layer(linear: nn.Linear, x: Tensor) -> Tensor:
        added = [
            low_rank_rows(at, *(getattr(linear.adapter, name) for name in ("lora_A", "lora_B", "bias")), ids)
            for at in (x.unbind(1) if x.dim() == 3 else [x])
        ]
        base = nn.functional.linear(x, linear.weight, linear.bias)
        return base + (torch.stack(added, 1) if x.dim() == 3 else added[0])

    x = own.sequences(batch.sparse_features)["item"].to_padded_dense(LENGTH)
    for linear in own.tower:
        x = layer(linear, x)
    x = torch.cat([x.relu().mean(1), own.bags(batch.sparse_features)["user"], batch.dense_features], 1)
    x = own.head[1](layer(own.head[0], x)).relu()
    return own.head[5](layer(own.head[4], x))


def test_positions_of_a_sequence_are_of_their_rows_domain() -> None:
    model, batch = build().eval(), clicks(1)
    torch.testing.assert_close(call(model, batch), by_rows(model, batch), rtol=1e-4, atol=1e-5)
    batch.scenario[:7] = -1
    with model.routed(Route.BASE):
        base = call(model, batch)
    torch.testing.assert_close(call(model, batch)[:7], base[:7])
    assert not torch.allclose(call(model, batch)[7:], base[7:])


@pytest.mark.parametrize("method", ["multilora", "moe_mlora", "moe_mlora_top_k"])
def test_the_layers_of_a_sequence_tower_are_those_of_single_positions(method: str) -> None:
    """A history of which all positions hold one item gives what a model of single items gives."""
    model, batch = build(method).eval(), clicks(1)

    def seen(positions: int) -> Tensor:
        x = torch.rand(len(batch.labels), 1, 8, generator=torch.Generator().manual_seed(1)).expand(-1, positions, -1)
        ids = torch.stack([batch.scenario, batch.scenario % 2], 1)[:, : len(model.divisions)]
        with model.context.open(model.router(ids)):
            tower = model.backbone.tower(x if positions > 1 else x[:, 0])
        return tower.mean(1) if positions > 1 else tower

    torch.testing.assert_close(seen(LENGTH), seen(1), rtol=1e-4, atol=1e-5)


def test_an_input_without_the_batch_in_front_is_refused() -> None:
    class Turned(OwnModel):
        def _pooled(self, history: Tensor) -> Tensor:
            return super()._pooled(history.transpose(0, 1)).sum() + history.new_zeros(len(history), 5)

    model = MultiDomainModel(Turned(), MLoRA(rank=2), SCENARIO, TARGETS)
    with pytest.raises(ValueError, match=r"layer 8 -> 6 got an input \[3, 40, 8\], but the batch has 40 rows"):
        call(model, clicks(1))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["mlora", "moe_mlora", "moe_mlora_top_k"])
def test_checkpointed_activations_are_computed_again_for_their_own_rows(method: str, reentrant: bool) -> None:
    """Two passes of different rows are open when the backward pass begins."""
    targets = ["head.0", "head.4"] if reentrant else TARGETS  # reentrant recomputing cannot share a gate between parts
    gradients = []
    for recompute in (None, reentrant):
        model = build(method, recompute, targets)
        model.backbone.head[3] = nn.Identity()
        one, two = (call(model, clicks(seed)) for seed in (1, 2))
        (one.square().sum() + two.sin().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".adapter" in n})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_saved_models_are_whole_and_hold_no_batch(method: str) -> None:
    model, batch = build(method, targets=["head.0", "head.4"]), clicks(1)
    stage = prepare_stage(model, {"mlora": "adapt", "multilora": "fuse"}.get(method, "gate"))
    optimizer = stage.optimizer(model, lr=1e-2)
    stage.train(model)
    call(model, batch).sum().backward()
    copied = copy.deepcopy(model)
    optimizer.step()
    model.eval()
    expected = call(model, batch)  # after which gates remember what they gave the rows
    buffer = io.BytesIO()
    torch.save(model, buffer)
    parameters = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    rows = len(batch.labels)
    with torch.no_grad():
        call(model, clicks(1, rows=20 * rows))
    again = io.BytesIO()
    torch.save(model, again)
    assert abs(again.tell() - buffer.tell()) < 1000 and parameters < buffer.tell()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(call(loaded, batch), expected)
    with torch.no_grad():  # the copy has tables of its own
        before = call(copied.eval(), batch)
        for table in copied.backbone.bags.parameters():
            table.add_(1.0)
        assert not torch.equal(call(copied, batch), before) and torch.equal(call(model, batch), expected)


def test_an_averaged_model_is_the_average() -> None:
    model = build()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    averaged.update_parameters(model)
    twice = build()
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2.0)
    torch.testing.assert_close(call(averaged.eval(), clicks(1)), call(twice.eval(), clicks(1)), rtol=1e-4, atol=1e-5)


def test_threads_and_nested_passes_have_domains_of_their_own() -> None:
    model, batches = build().eval(), [clicks(seed, rows=40 + seed) for seed in range(8)]
    with torch.no_grad():
        expected = [call(model, batch) for batch in batches]
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(_without_gradients, [model] * 80, batches * 10))
        assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(results))
        inner: list[Tensor] = []

        def nested(module: nn.Module, args: object, output: Tensor) -> None:
            if not inner:
                inner.append(torch.zeros(()))
                inner[0] = call(model, batches[1])

        model.backbone.tower.register_forward_hook(nested)
        assert torch.equal(call(model, batches[0]), expected[0]) and torch.equal(inner[0], expected[1])


def _without_gradients(model: nn.Module, batch: Clicks) -> Tensor:
    with torch.no_grad():
        return call(model, batch)


def test_a_layer_that_is_never_called_is_named() -> None:
    class Attending(OwnModel):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def _pooled(self, history: Tensor) -> Tensor:
            return super()._pooled(self.attention(history, history, history)[0])

    model = MultiDomainModel(Attending(), MLoRA(rank=2), SCENARIO, [*TARGETS, "attention.out_proj"])
    with pytest.raises(ValueError, match=r"adapters beside attention.out_proj, but its forward pass never calls them"):
        call(model, clicks(1))
    rest = MultiDomainModel(Attending(), MLoRA(rank=2), SCENARIO, TARGETS)
    assert call(rest, clicks(1)).shape == (40, 1)


def frozen_in_training(pipeline: type, noise: bool) -> list[object]:
    """A sharded model of one's own in its adapt stage: what moved, and whether dropout acts."""
    torch.manual_seed(2)
    model = MultiDomainModel(OwnModel(device="meta"), MLoRA(rank=2), SCENARIO, TARGETS)
    stage = prepare_stage(model, "adapt", backbone_noise=noise)
    dmp = shard(MultiDomainTrain(model, "scenario"))
    before = whole(dmp.state_dict()), whole(dmp.fused_optimizer.state_dict()["state"])
    running = pipeline(dmp, combined(dmp, stage.optimizer(dmp, lr=1e-2)), CPU)
    dmp.train()  # as a loop does it that does not know of stages
    batches: Iterator[Clicks] = iter([clicks(seed) for seed in range(4)])
    for _ in range(2):
        running.progress(batches)
    moved = differing(before[0], whole(dmp.state_dict()))
    fused = differing(before[1], whole(dmp.fused_optimizer.state_dict()["state"]))
    if isinstance(running, TrainPipelineSparseDist):
        running.detach()
    with torch.no_grad():
        logits = [dmp(clicks(7))[1][1] for _ in range(2)]
    return [moved, fused, torch.equal(*logits), len(before[1])]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("pipeline", "noise"), [(TrainPipelineSparseDist, False), (TrainPipelineBase, True)], ids=["sparse_dist", "base"]
)
def test_a_frozen_backbone_keeps_its_statistics_and_drops_nothing(
    pipeline: type, noise: bool, ranks: int, one_rank: RankPool, two_ranks: RankPool
) -> None:
    for moved, fused, same, tables in (one_rank if ranks == 1 else two_ranks).run(frozen_in_training, pipeline, noise):
        assert moved and all(".adapter." in name for name in moved) and not fused
        assert same is not noise and tables


def test_dlrm_train_is_taken_apart_and_its_own_way_is_refused() -> None:
    model = MultiDomainModel(DLRMTrain(build_dlrm(device="cpu")), MLoRA(rank=2), SCENARIO)
    batch = clicks(1)
    loss, (_, logits, _) = MultiDomainTrain(model, lambda b: b.sparse_features["scenario"].values())(batch)
    assert torch.equal(logits, call(model, batch).squeeze(1)) and loss.requires_grad
    with pytest.raises(ValueError, match="put MultiDomainTrain in place of DLRMTrain"):
        DLRMTrain(model)(batch)
    with pytest.raises(ValueError, match="parts for domains already"):
        MultiDomainModel(model.backbone, MLoRA(rank=2), SCENARIO)


def test_a_prepared_model_compiles_as_one_graph() -> None:
    model = MultiDomainModel(build_dlrm(device="cpu"), MLoRA(rank=2), SCENARIO)
    prepare_stage(model, "adapt").train(model)
    randomise({name: tensor for name, tensor in model.named_parameters() if ".adapter" in name})
    batch, found = clicks(1), []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        run(batch.dense_features, batch.sparse_features, batch.scenario).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] and all(".adapter." in name for name in found[0]) and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
