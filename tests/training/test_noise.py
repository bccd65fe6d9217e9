"""What `backbone_noise` turns off behind a frozen backbone: dropout, and the statistics of batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed.stage_runs import ADAM, SETTINGS, Job, batches, environment, jobs, some_rows, train_all
from tests.helpers import DIM, DIVISIONS, schema_of
from tests.ranks import RankPool
from torchrec_mdr.methods import MLoRA, MultiLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.stage_runtime import StageRuntime

STEPS = some_rows()


@pytest.mark.parametrize("noise", [True, False])
def test_behind_a_backbone_without_noise_norms_keep_their_statistics(noise: bool, one_rank: RankPool) -> None:
    settings = replace(SETTINGS, backbone_noise=noise)
    _, *stages = jobs(MultiLoRA(rank=3), "mlp", settings=settings)
    for job, outcome in zip(stages, one_rank.run(train_all, stages, STEPS)[0], strict=True):
        moved = {name for name, tensor in outcome.before.items() if not torch.equal(tensor, outcome.after[name])}
        assert any(name.endswith("running_var") for name in moved) == noise, job.stage.name
        assert any(name.endswith(".norm.combinations.weight") or ".norm.domains." in name for name in moved)


def dropped(noise: bool) -> list[float]:
    """Losses of one step on the same rows, made twice."""
    backbone = BACKBONES["mlp"](hidden=(10, 5), dropout=0.5).build(schema_of(), DIM)
    stage = MLoRA().stages(DIVISIONS[:1])[1]
    model = MultiDomainModel(backbone, MLoRA(), DIVISIONS[:1])
    settings = StageConfig(learning_rate=0.0, backbone_noise=noise)
    runtime = StageRuntime(model, stage, settings, ADAM, None, seed=7, environment=environment())
    job = Job(MLoRA(), stage, divisions=DIVISIONS[:1])
    return [float(output.loss) for output in runtime.train(batches(job, [STEPS[0]] * 2))]


def test_behind_a_backbone_without_noise_nothing_is_dropped(one_rank: RankPool) -> None:
    for noise in (True, False):
        first, second = one_rank.run(dropped, noise)[0]
        assert (first == second) != noise
