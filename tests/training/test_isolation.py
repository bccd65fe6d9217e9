"""Adapters of different domains train as if alone (docs/departures.md, isolation)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.distributed.stage_runs import (
    SETTINGS,
    Job,
    Outcome,
    batches,
    jobs,
    make_runtime,
    some_rows,
    train_all,
    whole,
)
from tests.helpers import Rows, random_rows, sort_rows, with_others_changed
from tests.ranks import RankPool
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA

STEPS = some_rows()
WEIGHTS = torch.tensor([0.7, 2.0, 3.0])
METHODS = [
    ("mlora", MLoRA(rank=3), "mlp"),
    ("single_lora", SingleLoRA(rank=3), "mlp"),
    ("multilora", MultiLoRA(rank=3), "mlp"),
    ("moe_mlora", MoEMLoRA(rank=3, experts_per_domain=2), "mlp"),
    ("multilora", MultiLoRA(rank=3), "dlrm"),
    ("mlora", MLoRA(rank=3), "dlrm_dcn"),
]


def adapt_jobs(method: Method, backbone: str) -> list[Job]:
    """The adapt stages, with domain weights."""
    found = [job for job in jobs(method, backbone, settings=SETTINGS) if job.stage.per_domain]
    return [
        replace(job, domain_weights=WEIGHTS[: job.sizes[job.stage.division]], expert_index=job.stage.expert_passes - 1)
        for job in found
    ]


def rows_of(job: Job, tensors: dict[str, Tensor], like: Outcome, domain: int) -> dict[str, Tensor]:
    """A domain's rows of what the stage trains: adapters, norms and their statistics."""
    row = domain + job.expert_index * job.sizes[job.stage.division]
    moved = [name for name, tensor in like.before.items() if not torch.equal(tensor, like.after[name])]
    return {name: tensors[name][row] for name in moved}


def with_domain_kept(steps: list[Rows], division: int, domain: int) -> list[Rows]:
    """New labels and features for everybody else."""
    return [with_others_changed(rows, division, domain, seed=100 + step) for step, rows in enumerate(steps)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "method", "backbone"), METHODS, ids=[f"{n}-{b}" for n, _, b in METHODS])
def test_other_domains_rows_do_not_touch_an_adapter(
    name: str, method: Method, backbone: str, ranks: int, one_rank: RankPool, two_ranks: RankPool
) -> None:
    pool = one_rank if ranks == 1 else two_ranks
    for job in adapt_jobs(method, backbone):
        base = pool.run(train_all, [job], STEPS)[0][0]
        for domain in range(job.sizes[job.stage.division]) if ranks == 1 else (1,):
            changed = pool.run(train_all, [job], with_domain_kept(STEPS, job.stage.division, domain))[0][0]
            ours, theirs = (rows_of(job, outcome.after, base, domain) for outcome in (base, changed))
            assert len(ours) >= 4
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
            others = [d for d in range(job.sizes[job.stage.division]) if d != domain]
            for other in others:  # the test would be idle if they stayed the same
                ours, theirs = (rows_of(job, outcome.after, base, other) for outcome in (base, changed))
                assert any(not torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def more_of_the_others(rows: Rows, division: int, domain: int, seed: int) -> Rows:
    """The domain's rows as they are, and half as many rows again of the others, all new ones."""
    own = rows.pick(rows.domains[:, division] == domain)
    other = random_rows(4 * len(rows), seed=seed)
    other = other.pick(other.domains[:, division] != domain).pick(slice(None, None, 2))
    other = other.pick(slice(len(rows) + len(rows) // 2 - len(own)))
    joined = (torch.cat([getattr(own, f), getattr(other, f)]) for f in ("dense", "sparse", "labels", "domains"))
    return sort_rows(Rows(*joined))


@pytest.mark.parametrize(("name", "method", "backbone"), METHODS[:4], ids=[n for n, _, _ in METHODS[:4]])
def test_with_other_counts_an_adapter_stays_the_same_up_to_rounding(
    name: str, method: Method, backbone: str, one_rank: RankPool
) -> None:
    steps = [random_rows(48, seed=step) for step in range(4)]
    domain = 1
    for job in adapt_jobs(method, backbone):
        more = [more_of_the_others(rows, job.stage.division, domain, 50 + step) for step, rows in enumerate(steps)]
        assert all(len(rows) == 72 for rows in more)
        # weights are the inverse of the domain's share, which is two thirds of what it was
        heavier = replace(job, domain_weights=job.domain_weights * 1.5)
        base, changed = one_rank.run(train_all, [job], steps)[0][0], one_rank.run(train_all, [heavier], more)[0][0]
        theirs = rows_of(job, changed.after, base, domain)
        for key, tensor in rows_of(job, base.after, base, domain).items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=2e-5, msg=key)


def train_frozen(job: Job, frozen: Tensor, steps: list[Rows]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters' tensors before and after training, with some domains frozen."""
    runtime = make_runtime(job)
    before = whole(runtime.state(job.stage.trains))
    runtime.prepared.freeze_domains(frozen, job.expert_index)
    list(runtime.train(batches(job, steps)))
    return before, whole(runtime.state(job.stage.trains))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", [MLoRA(rank=3), MoEMLoRA(rank=3, experts_per_domain=2)], ids=["mlora", "moe_mlora"])
def test_a_domain_whose_patience_has_run_out_does_not_move(
    method: Method, ranks: int, one_rank: RankPool, two_ranks: RankPool
) -> None:
    (job,) = adapt_jobs(method, "mlp")
    pool, frozen = one_rank if ranks == 1 else two_ranks, torch.tensor([False, True, False])
    for before, after in pool.run(train_frozen, job, frozen, STEPS):
        for name, tensor in before.items():
            moved = (tensor != after[name]).flatten(1).any(1).view(-1, 3)
            assert moved[job.expert_index].tolist() == [True, False, True], name
            assert not moved[: job.expert_index].any(), name  # an expert whose pass is over
