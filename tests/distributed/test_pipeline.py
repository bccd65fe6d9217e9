"""Training through the sharded pipeline against a plain loop over the unsharded model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.distributed.stage_runs import ADAM, EVERYTHING, SETTINGS, Job, batches, jobs, make_runtime, train, whole
from tests.helpers import DIM, Rows, build_backbone, random_rows
from tests.ranks import RankPool
from torchrec_mdr.adapters.norm import DomainNorm
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.config import StageConfig

STEPS = [random_rows(192, seed=step) for step in range(4)]  # enough rows of each combination for its statistics
WEIGHTS = torch.tensor([0.7, 2.0, 3.0])
PLAIN_OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "rowwise_adagrad": partial(RowWiseAdagrad, eps=1e-8),
    "adagrad": partial(torch.optim.Adagrad, eps=1e-8),
    "sgd": torch.optim.SGD,
}


def plain_loop(job: Job, start: dict[str, Tensor], steps: list[Rows]) -> dict[str, Tensor]:
    """Trains the unsharded model from the same start, with nothing of the runtime."""
    model = MultiDomainModel(materialize_tables(build_backbone(job.backbone)), job.method, job.divisions)
    model.load_state_dict(start)
    runtime = make_runtime(job)
    trained = {name for name, parameter in runtime.model.named_parameters() if parameter.requires_grad}
    model.set_route(job.stage.route, job.stage.division, job.expert_index)
    model.train()
    if not job.stage.trains_backbone:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d) and not isinstance(module, DomainNorm):
                module.eval()
    dense, tables = [], []
    for name, parameter in model.named_parameters():
        in_table = "embedding_bags" in name
        parameter.requires_grad_(job.stage.trains_embeddings if in_table else name in trained)
        if parameter.requires_grad:
            (tables if in_table else dense).append(parameter)
    settings = job.settings
    optimizers = [torch.optim.Adam(dense, lr=settings.learning_rate, weight_decay=settings.weight_decay)]
    if tables:
        kind = PLAIN_OPTIMIZERS[job.embeddings.optimizer]
        decay = settings.weight_decay if job.embeddings.optimizer == "adam" else 0.0
        optimizers.append(kind(tables, lr=settings.embedding_learning_rate, weight_decay=decay))
    for rows in steps:
        logits = model(rows.dense, rows.kjt(), rows.domains[:, : len(job.divisions)]).squeeze(1)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, rows.labels, reduction="none")
        if job.domain_weights is not None:
            losses = losses * job.domain_weights[rows.domains[:, job.stage.division]]
        model.zero_grad()
        losses.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def both(job: Job, steps: list[Rows]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The start, and the result of the pipeline and of the plain loop."""
    outcome = train(job, steps)
    return outcome.before, outcome.after, plain_loop(job, outcome.before, steps)


@pytest.mark.parametrize("backbone", ["mlp", "dlrm_dcn"])
@pytest.mark.parametrize(
    "method",
    [MLoRA(rank=3), SingleLoRA(rank=3), MultiLoRA(rank=3), MultiLoRA(rank=3, schedule="joint"), MoEMLoRA(rank=3)],
    ids=["mlora", "single_lora", "multilora", "multilora_joint", "moe_mlora"],
)
def test_pipelined_equals_plain(method: Method, backbone: str, one_rank: RankPool) -> None:
    """BankAdam is torch.optim.Adam here, since all domains are in every step."""
    for job in jobs(method, backbone, settings=SETTINGS):
        if job.stage.per_domain and job.stage.division == 0:
            job = replace(job, domain_weights=WEIGHTS)
        start, pipelined, plain = one_rank.run(both, job, STEPS)[0]
        for name, tensor in plain.items():
            torch.testing.assert_close(
                pipelined[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda m, n=name, j=job: f"{j.stage.name} {n}: {m}"
            )
        assert any(not torch.equal(start[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_fused_optimizers_equal_plain_ones(optimizer: str, one_rank: RankPool) -> None:
    job = jobs(
        MLoRA(rank=3),
        "dlrm",
        embeddings=EmbeddingConfig(dim=DIM, optimizer=optimizer),
        settings=StageConfig(embedding_learning_rate=0.02),
    )[0]
    start, pipelined, plain = one_rank.run(both, job, STEPS)[0]
    for name, tensor in plain.items():
        torch.testing.assert_close(pipelined[name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(start[name], tensor) == ("adapter" in name), name


def penalised_step(job: Job, steps: list[Rows]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tables after one step of SGD, and what autograd on the written-out penalty gives."""
    outcome = train(job, steps)
    (rows,) = steps
    model = MultiDomainModel(materialize_tables(build_backbone(job.backbone)), job.method, job.divisions)
    model.load_state_dict(outcome.before)
    model.set_route(job.stage.route)
    logits = model(rows.dense, rows.kjt(), rows.domains[:, :1]).squeeze(1)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, rows.labels)
    tables = {name: table for name, table in model.named_parameters() if "embedding_bags" in name}
    for feature, table in enumerate(tables.values()):
        loss = loss + job.settings.embedding_l2 * table[rows.sparse[:, feature]].square().sum() / len(rows)
    gradients = torch.autograd.grad(loss, list(tables.values()))
    rate = job.settings.embedding_learning_rate
    expected = {
        name: table.detach() - rate * gradient
        for (name, table), gradient in zip(tables.items(), gradients, strict=True)
    }
    return outcome.after, expected


@pytest.mark.parametrize("backbone", ["mlp", "dlrm"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_penalty_on_embeddings_is_that_of_the_looked_up_rows_over_the_global_batch(
    ranks: int, backbone: str, one_rank: RankPool, two_ranks: RankPool
) -> None:
    job = jobs(
        MLoRA(rank=3),
        backbone,
        embeddings=EmbeddingConfig(dim=DIM, optimizer="sgd"),
        settings=StageConfig(embedding_l2=3.0, embedding_learning_rate=0.1),
    )[0]
    pool = one_rank if ranks == 1 else two_ranks
    for after, expected in pool.run(penalised_step, job, STEPS[:1]):
        for name, table in expected.items():
            torch.testing.assert_close(after[name], table, rtol=1e-4, atol=1e-6, msg=name)


def losses_with(job: Job, steps: list[Rows]) -> tuple[list[float], list[bool]]:
    """The losses that are reported in training, and whether what is kept of a step has gradients."""
    runtime = make_runtime(job)
    outputs = list(runtime.train(batches(job, steps)))
    return [float(output.loss) for output in outputs], [
        t.requires_grad for output in outputs for t in output if t is not None
    ]


def test_the_reported_loss_is_the_cross_entropy_alone(one_rank: RankPool) -> None:
    job = jobs(MLoRA(rank=3), "mlp")[0]
    plain, _ = one_rank.run(losses_with, job, STEPS[:1])[0]
    penalised, kept = one_rank.run(losses_with, replace(job, settings=StageConfig(embedding_l2=3.0)), STEPS[:1])[0]
    assert plain == penalised and not any(kept)


def alternate(job: Job, steps: list[Rows]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Training in two parts with an evaluation between, and in one part; rows that came out of each iterator."""
    runtime, seen = make_runtime(job), []
    for part in (steps[:2], steps[2:]):
        seen.append(len(list(runtime.train(batches(job, part)))))
        seen.append(len(list(runtime.evaluate(batches(job, steps)))))
    return whole(runtime.state(EVERYTHING)), train(job, steps).after, seen


def test_evaluation_between_steps_changes_nothing_and_no_batch_is_lost(one_rank: RankPool) -> None:
    for job in jobs(MultiLoRA(rank=3), "mlp", embeddings=ADAM):
        parts, once, seen = one_rank.run(alternate, job, STEPS)[0]
        assert seen == [2, 4, 2, 4]
        assert all(torch.equal(tensor, once[name]) for name, tensor in parts.items())
