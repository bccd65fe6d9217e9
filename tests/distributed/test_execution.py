"""Precision and compilation of what a sharded stage runs."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.stage_runs import SETTINGS, Job, batches, jobs, make_runtime, train
from tests.helpers import Rows, build_backbone, random_rows
from tests.ranks import RankPool
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.distributed import execution
from torchrec_mdr.methods import MLoRA, MoEMLoRA, MultiLoRA

STEPS = [random_rows(size, seed=size) for size in (192, 192, 150)]
ALL = {
    "mlora": (MLoRA(rank=3), "dlrm"),
    "multilora": (MultiLoRA(rank=3), "mlp"),
    "moe_mlora": (MoEMLoRA(), "dlrm_dcn"),
}


PAIR = "mlora"


def compiled_and_eager(job: Job, steps: list[Rows], backend: str) -> tuple[Any, Any]:
    """What a stage comes to in both forms; a break in a graph is an error."""
    original = torch.compile
    torch.compile = functools.partial(original, backend=backend, fullgraph=True)  # type: ignore[assignment]
    try:
        torch._dynamo.reset()
        fast = train(replace(job, compiles=True), steps)
    finally:
        torch.compile = original
    return fast, train(job, steps)


def check(job: Job, ranks: RankPool, backend: str) -> None:
    for fast, eager in ranks.run(compiled_and_eager, job, STEPS, backend):
        torch.testing.assert_close(fast.losses, eager.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.logits, eager.logits, rtol=1e-3, atol=1e-4)
        for name, tensor in eager.after.items():
            torch.testing.assert_close(fast.after[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{job.stage.name} {name}")


@pytest.mark.parametrize("pair", [PAIR, *(pytest.param(name, marks=pytest.mark.full) for name in ALL if name != PAIR)])
def test_what_holds_no_table_compiles_without_a_break(pair: str, one_rank: RankPool) -> None:
    for job in jobs(*ALL[pair], settings=SETTINGS)[1:]:
        check(job, one_rank, "aot_eager")


@pytest.mark.full
def test_compiled_stages_share_gradients_over_ranks(two_ranks: RankPool) -> None:
    check(jobs(*ALL["mlora"], settings=SETTINGS)[1], two_ranks, "aot_eager")


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pair", ALL)
def test_inductors_code_trains_alike(pair: str, one_rank: RankPool) -> None:
    one_rank.timeout = 1500.0
    check(jobs(*ALL[pair], settings=SETTINGS)[-1], one_rank, "inductor")


@pytest.mark.parametrize(("backbone", "names"), [("mlp", ["over_arch"]), ("dlrm", ["dense_arch", "over_arch"])])
def test_the_largest_modules_without_tables_are_compiled(backbone: str, names: list[str]) -> None:
    assert execution.compile_dense(materialize_tables(build_backbone(backbone))) == names


def in_both_precisions(job: Job, steps: list[Rows]) -> dict[str, list[Tensor]]:
    """Losses of training, and logits of evaluation from the same start, by precision."""
    found = {}
    for precision in ("fp32", "bf16"):
        evaluated = [o.logits for o in make_runtime(replace(job, precision=precision)).evaluate(batches(job, steps))]
        found[precision] = [torch.tensor(train(replace(job, precision=precision), steps).losses), *evaluated]
    return found


@pytest.mark.parametrize("pair", ["mlora", "multilora"])
def test_bf16_trains_under_autocast_and_evaluates_in_float32(pair: str, one_rank: RankPool) -> None:
    for job in jobs(*ALL[pair], settings=SETTINGS):
        (found,) = one_rank.run(in_both_precisions, job, STEPS)
        (exact, *evaluated), (low, *as_well) = found["fp32"], found["bf16"]
        assert not torch.equal(exact, low)
        torch.testing.assert_close(low, exact, rtol=0.05, atol=0.01)
        assert all(torch.equal(one, other) for one, other in zip(evaluated, as_well, strict=True))


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="--precision tf32 needs an NVIDIA GPU"):
        execution.set_float32_products("tf32", torch.device("cpu"))
