"""Every stage of every method, on one and two ranks: what moves, what stays, and what ranks agree on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.distributed.stage_runs import ADAM, ROWWISE, SETTINGS, Job, Outcome, evaluate, jobs, some_rows, train_all
from tests.helpers import random_rows
from tests.ranks import RankPool
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.methods.stage import ADAPTERS, EMBEDDINGS

METHODS: dict[str, Method] = {
    "mlora": MLoRA(rank=3),
    "mlora_joint": MLoRA(rank=3, schedule="joint"),
    "single_lora": SingleLoRA(rank=3),
    "multilora": MultiLoRA(rank=3),
    "multilora_add": MultiLoRA(rank=3, fusion="add"),
    "multilora_joint": MultiLoRA(rank=3, schedule="joint"),
    "moe_mlora": MoEMLoRA(rank=3, experts_per_domain=2),
    "moe_mlora_input": MoEMLoRA(rank=3, gate_input="domain_and_input", per_layer=True),
}
RUNS = [
    ("mlora", "mlp", ADAM),
    ("mlora_joint", "mlp", ROWWISE),
    ("single_lora", "mlp", ADAM),
    ("multilora", "mlp", ROWWISE),
    ("multilora_joint", "mlp", ADAM),
    ("moe_mlora", "mlp", ADAM),
    ("mlora", "dlrm", ROWWISE),
    ("multilora_add", "dlrm", ADAM),
    ("moe_mlora_input", "dlrm", ROWWISE),
    ("mlora", "dlrm_dcn", ADAM),
    ("multilora", "dlrm_dcn", ADAM),
    ("multilora_joint", "dlrm_dcn", ROWWISE),
    ("moe_mlora", "dlrm_dcn", ROWWISE),
]
STEPS = some_rows()


@dataclass
class Runs:
    """A method's stages on one rank, and on each of two."""

    jobs: list[Job]
    one: list[Outcome]
    two: list[tuple[Outcome, Outcome]]

    def all(self) -> Iterator[tuple[Job, Outcome]]:
        """Every outcome, with its job."""
        for job, one, two in zip(self.jobs, self.one, self.two, strict=True):
            for outcome in (one, *two):
                yield job, outcome


WHOLE = [(m, b, e) for m in METHODS for b in ("mlp", "dlrm", "dlrm_dcn") for e in (ADAM, ROWWISE)]
PARAMS = [
    pytest.param(run, id="-".join([*run[:2], run[2].optimizer]), marks=[] if run in RUNS else pytest.mark.full)
    for run in [*RUNS, *(run for run in WHOLE if run not in RUNS)]
]


@pytest.fixture(scope="module", params=PARAMS)
def runs(request: pytest.FixtureRequest, one_rank: RankPool, two_ranks: RankPool) -> Runs:
    name, backbone, embeddings = request.param
    options = {"embeddings": embeddings, "settings": SETTINGS}
    todo = jobs(METHODS[name], backbone, **options)
    if name == "moe_mlora":  # the second pass of the adapt stage
        todo.append(replace(todo[1], expert_index=1))
    (one,) = one_rank.run(train_all, todo, STEPS)
    return Runs(todo, one, list(zip(*two_ranks.run(train_all, todo, STEPS), strict=True)))


def trains(job: Job, outcome: Outcome, name: str) -> bool:
    """Whether a stage trains a tensor: by the group, and on the DOMAIN route by the division."""
    if job.stage.route is Route.DOMAIN and outcome.groups[name] is ADAPTERS:
        for kind in (".banks.", ".domains."):
            if kind in name and not name.split(kind)[1].startswith(f"{job.stage.division}."):
                return False
    return outcome.groups[name] in job.stage.trains


def is_reached(job: Job, name: str) -> bool:
    """Whether the stage's route leads through a tensor; the base norm stands aside where domain norms work."""
    if job.stage.route is Route.BASE:
        return True
    replaced = isinstance(job.method, (MultiLoRA, SingleLoRA)) and ".norm." in name
    if not replaced:
        return True
    return ".combinations." in name if job.stage.route is Route.FUSED else ".domains." in name


def moves(job: Job, outcome: Outcome, name: str) -> bool:
    """Whether a tensor has to move."""
    return trains(job, outcome, name) and is_reached(job, name)


def test_what_a_stage_does_not_train_stays_bitwise_and_what_it_trains_moves(runs: Runs) -> None:
    for job, outcome in runs.all():
        for name, before in outcome.before.items():
            moved = not torch.equal(before, outcome.after[name])
            assert moved == moves(job, outcome, name), (job.stage.name, name)


def test_frozen_parameters_have_no_optimizer_state(runs: Runs) -> None:
    for job, outcome in runs.all():
        owners = {key.split("/")[1].removeprefix("model.") for key in outcome.optimizer}
        assert all(trains(job, outcome, owner) for owner in owners)
        assert all(moves(job, outcome, owner) for owner in owners if job.stage.route is not Route.FUSED)
        tables = [owner for owner in owners if outcome.groups[owner] is EMBEDDINGS]
        assert len(tables) == (3 if job.stage.trains_embeddings else 0)
        assert all(tensor.isfinite().all() for tensor in outcome.optimizer.values())


def test_trainable_parameters_are_those_of_the_stage(runs: Runs) -> None:
    for job, outcome in runs.all():
        parameters = [name for name in outcome.before if "running" not in name and "num_batches" not in name]
        expected = sum(outcome.before[name].numel() for name in parameters if trains(job, outcome, name))
        assert outcome.trainable == expected, job.stage.name


def test_one_rank_equals_two(runs: Runs) -> None:
    """Shares are unequal, and some domains come up on one rank alone."""
    for job, one, two in zip(runs.jobs, runs.one, runs.two, strict=True):
        for name, tensor in one.after.items():
            assert torch.allclose(two[0].after[name], tensor, rtol=1e-5, atol=2e-6), (job.stage.name, name)
        for name, tensor in one.optimizer.items():
            assert torch.allclose(two[0].optimizer[name], tensor, rtol=1e-3, atol=1e-6), (job.stage.name, name)
        mean = torch.tensor([outcome.losses for outcome in two]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(one.losses))
        torch.testing.assert_close(torch.cat([outcome.logits for outcome in two]), one.logits, rtol=1e-4, atol=1e-5)


def test_ranks_agree_bitwise(runs: Runs) -> None:
    for first, second in runs.two:
        assert set(first.optimizer) == set(second.optimizer)
        for ours, theirs in ((first.after, second.after), (first.optimizer, second.optimizer)):
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def of_bank(name: str) -> bool:
    """Whether a tensor belongs to a bank of adapters or norms."""
    of_norms, of_adapters = ".combinations." in name or ".domains." in name, ".adapter" in name and ".gate." not in name
    return of_norms or (of_adapters and name.rpartition(".")[2] in ("lora_A", "lora_B", "bias", "scale"))


def bank_rows(job: Job, name: str, domains: Tensor) -> Tensor:
    """Which rows of a bank's tensor belong to the domains of a step, as bool [num_adapters]."""
    ids, total = domains[:, 0], job.sizes[0]
    if ".combinations." in name:
        ids, total = ids * job.sizes[1] + domains[:, 1], total * job.sizes[1]
    elif match := re.search(r"\.(?:banks|domains)\.(\d)\.", name):
        ids, total = domains[:, int(match[1])], job.sizes[int(match[1])]
    elif isinstance(job.method, MoEMLoRA):
        ids, total = ids + job.expert_index * total, total * job.method.experts_per_domain
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, ids, True)


def test_rows_of_absent_domains_do_not_move(runs: Runs) -> None:
    for job, outcome in runs.all():
        trained = [name for name in outcome.before if moves(job, outcome, name)]
        banks = {name: [bank_rows(job, name, rows.domains) for rows in STEPS] for name in trained if of_bank(name)}
        assert bool(banks) == (ADAPTERS in job.stage.trains or ".combinations." in "".join(trained))
        for name, present in banks.items():
            for step, (before, after) in enumerate(pairwise(outcome.states)):
                changed = (before[name] != after[name]).flatten(1).any(1)
                assert not changed[~present[step]].any(), (job.stage.name, name, step)
                if name.endswith((".lora_B", ".bias")):
                    assert torch.equal(changed, present[step]), (job.stage.name, name, step)
            assert present[0].sum() > present[1].sum()
            if "running" not in name:
                assert torch.equal(outcome.optimizer[f"banks/model.{name}/step"], torch.stack(present).float().sum(0))


@pytest.mark.parametrize("embeddings", [ADAM, ROWWISE], ids=["adam", "rowwise_adagrad"])
def test_rows_of_a_table_that_are_not_looked_up_do_not_move(embeddings: EmbeddingConfig, two_ranks: RankPool) -> None:
    (job, *_) = jobs(METHODS["mlora"], "dlrm", embeddings=embeddings)  # weight decay moves all rows of Adam's tables
    outcome = two_ranks.run(train_all, [job], STEPS[1:3])[0][0]
    for feature, name in enumerate("abc"):
        (table,) = [key for key in outcome.before if key.endswith(f"t_{name}.weight")]
        changed = (outcome.before[table] != outcome.after[table]).any(1)
        looked_up = torch.cat([rows.sparse[:, feature] for rows in STEPS[1:3]]).unique()
        assert torch.equal(changed.nonzero().flatten(), looked_up) and len(looked_up) < len(changed)


def test_a_rank_may_be_without_rows_in_evaluation(one_rank: RankPool, two_ranks: RankPool) -> None:
    rows = [random_rows(2), random_rows(1)]  # a third of two rows is none
    for name, embeddings in (("multilora", ROWWISE), ("moe_mlora", ADAM)):
        for job in jobs(METHODS[name], "mlp", embeddings=embeddings):
            one, two = one_rank.run(evaluate, job, rows)[0], two_ranks.run(evaluate, job, rows)
            assert [len(logits) for logits in two[0]] == [0, 0]
            for ours, theirs in zip(two[1], one, strict=True):
                torch.testing.assert_close(ours, theirs)
