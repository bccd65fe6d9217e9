"""The baselines' stages on one and two ranks: what moves, what stays, what ranks agree on, and who sees whose rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from tests.distributed.stage_runs import ADAM, ROWWISE, SETTINGS, Job, Outcome, jobs, some_rows, train_all
from tests.helpers import with_others_changed
from tests.ranks import RankPool
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.baselines import PLE, Finetune, Hamur, Mix, MMoE, Plate, SharedBottom, Single, Star
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods import Method

METHODS: dict[str, Method] = {
    "mix": Mix(),
    "single": Single(),
    "finetune": Finetune(),
    "finetune_layers": Finetune(embeddings=False),
    "shared_bottom": SharedBottom(),
    "mmoe": MMoE(),
    "ple": PLE(num_specific_experts=2),
    "star": Star(),
    "hamur": Hamur(k=4, bottleneck=6, hyper_hidden=8),
    "plate": Plate(),
}
RUNS: list[tuple[str, str, EmbeddingConfig]] = [
    ("mix", "dlrm", ROWWISE),
    ("single", "mlp", ADAM),
    ("single", "dlrm_dcn", ROWWISE),
    ("finetune", "mlp", ROWWISE),
    ("finetune", "dlrm_dcn", ADAM),
    ("finetune_layers", "mlp", ADAM),
    ("shared_bottom", "mlp", ADAM),
    ("mmoe", "mlp", ROWWISE),
    ("ple", "mlp", ADAM),
    ("star", "mlp", ROWWISE),
    ("hamur", "mlp", ADAM),
    ("plate", "mlp", ROWWISE),
    ("plate", "dlrm_dcn", ADAM),
]
STEPS = some_rows()


@dataclass
class Runs:
    """A method's stages on one rank, and on each of two."""

    jobs: list[Job]
    one: list[Outcome]
    two: list[tuple[Outcome, ...]]


@pytest.fixture(scope="module", params=RUNS, ids=[f"{m}-{b}-{e.optimizer}" for m, b, e in RUNS])
def runs(request: pytest.FixtureRequest, one_rank: RankPool, two_ranks: RankPool) -> Runs:
    name, backbone, embeddings = request.param
    todo = jobs(METHODS[name], backbone, embeddings=embeddings, settings=SETTINGS)
    (one,) = one_rank.run(train_all, todo, STEPS)
    return Runs(todo, one, list(zip(*two_ranks.run(train_all, todo, STEPS), strict=True)))


def test_a_stage_moves_every_tensor_it_trains_and_no_other(runs: Runs) -> None:
    for job, outcomes in zip(runs.jobs, zip(runs.one, runs.two, strict=True), strict=True):
        for outcome in (outcomes[0], *outcomes[1]):
            for name, before in outcome.before.items():
                moved = not torch.equal(before, outcome.after[name])
                assert moved == (outcome.groups[name] in job.stage.trains), (job.stage.name, name)


def test_one_rank_equals_two_and_ranks_agree(runs: Runs) -> None:
    for job, one, two in zip(runs.jobs, runs.one, runs.two, strict=True):
        for name, tensor in one.after.items():
            torch.testing.assert_close(two[0].after[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{job.stage.name} {name}")
            assert torch.equal(two[0].after[name], two[1].after[name]), (job.stage.name, name)
        mean = torch.tensor([outcome.losses for outcome in two]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(one.losses), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([outcome.logits for outcome in two]), one.logits, rtol=1e-3, atol=1e-3)


def test_a_domain_that_is_absent_keeps_its_own_layers(runs: Runs) -> None:
    """The last domain is there in the first step alone."""
    for job, outcomes in zip(runs.jobs, zip(runs.one, runs.two, strict=True), strict=True):
        for outcome in (outcomes[0], outcomes[1][0]):
            keys = [key for key in outcome.optimizer if key.startswith("banks/") and key.endswith("/step")]
            own = [key.split("/")[1].removeprefix("model.") for key in keys]
            for name in own:
                moved = [
                    (before[name] != after[name]).flatten(1).any(1)[-1] for before, after in pairwise(outcome.states)
                ]
                assert moved == [True, False, False, False], (job.stage.name, name)
    if not isinstance(runs.jobs[0].method, Mix):
        assert own


@pytest.mark.parametrize(("name", "backbone"), [("single", "mlp"), ("single", "dlrm_dcn"), ("finetune", "mlp")])
def test_a_domain_does_not_depend_on_other_domains_rows(name: str, backbone: str, one_rank: RankPool) -> None:
    job = jobs(METHODS[name], backbone, embeddings=ADAM)[-1]
    assert job.stage.per_domain
    sizes = job.sizes[0]
    for domain in range(sizes):
        changed = [with_others_changed(rows, 0, domain, seed=40 + step) for step, rows in enumerate(STEPS)]
        (outcomes,) = zip(*[one_rank.run(train_all, [job], steps)[0] for steps in (STEPS, changed)], strict=True)
        ours, others = outcomes
        compared = 0
        for key, tensor in ours.after.items():
            if ours.groups[key] in job.stage.trains:
                # in a table the pretrained part may come first
                rows = sizes + (".t_" in key and name == "finetune")
                parts = [t.after[key].view(rows, -1) for t in (ours, others)]
                assert torch.equal(parts[0][domain - sizes], parts[1][domain - sizes]), key
                assert not torch.equal(parts[0], parts[1]), key
                compared += tensor.numel()
        assert (
            compared == sum(t.numel() for key, t in ours.after.items() if ours.groups[key] in job.stage.trains)
            and compared > 0
        )


def test_groups(one_rank: RankPool) -> None:
    """What trains from scratch is the backbone's, what is tuned after pretraining the adapters'."""
    for name, method in METHODS.items():
        outcome = one_rank.run(train_all, jobs(method)[:1], STEPS[:1])[0][0]
        tuned = {key for key, group in outcome.groups.items() if group is ParameterGroup.ADAPTERS}
        assert bool(tuned) == (name in ("finetune", "finetune_layers", "plate"))
        assert ParameterGroup.GATE not in outcome.groups.values()
