"""Runs that are killed again and again come to the same bits: `make test-faults`."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.processes import Blow, Job
from tests.test_train import SMALL, same_result

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
NOISY = [*SMALL, "--backbone_options.dropout=0.2", "--checkpoint_seconds=0.05", "--hang_seconds=30", "--resume=auto"]
NOISY += ["--stages.pretrain.ema_decay=0.9", "--stages.adapt.validations_per_epoch=3"]
METHODS = {
    "mlora": ["--method=mlora"],
    "multilora": ["--method=multilora", "--stages.fuse.validations_per_epoch=2"],
    "moe_mlora": ["--method=moe_mlora", "--method_options.experts_per_domain=2"],
    "star": ["--method=star"],
}
KILLS = int(os.environ.get("MDR_KILLS", "25"))  # of each method and number of ranks
counted: list[int] = []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_kills_at_any_moment(method: str, ranks: int, tmp_path: Path) -> None:
    environment = {"MDR_CACHE": str(tmp_path / "cache")}
    options = [*NOISY, *METHODS[method]]
    whole = Job([*options, f"--output_dir={tmp_path / 'whole'}"], tmp_path / "logs", ranks, environment)
    ended = whole.run()
    assert ended.codes == [0] * ranks, ended.said[0][-2000:]
    events, draw, kills = whole.events, random.Random(f"{method}/{ranks}"), 0
    stages = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    chain = 0
    while kills < KILLS:
        chain += 1
        broken = tmp_path / f"broken{chain}"
        job = Job([*options, f"--output_dir={broken}"], tmp_path / "logs", ranks, environment)
        for _ in range(60):
            on = draw.randrange(ranks)
            # the second of two ranks sees fewer files
            most = events // 3 if on == 0 else events // 8
            again = kills < KILLS
            ended = job.run(Blow(on, draw.randint(1, most) if again else 0, all_ranks=draw.random() < 0.5))
            if ended.codes == [0] * ranks:
                break
            assert -9 in ended.codes or None in ended.codes, (ended.codes, [said[-3000:] for said in ended.said])
            kills += ended.codes[on] == -9
            others = [code for rank, code in enumerate(ended.codes) if rank != on]
            assert all(code in (75, None, 2, -9) for code in others), (ended.codes, ended.said)
        assert ended.codes == [0] * ranks, ended.said[0][-3000:]
        same_result(tmp_path / "whole", broken, stages)
        left = [p.name for p in broken.rglob("*") if p.name.endswith((".writing", ".progress", ".lock"))]
        assert not left, left
    counted.append(kills)
    what = f"{kills} kills in {chain} runs of {events} moments"
    print(f"\n{method}, {ranks} ranks: {what}, the same bits; {sum(counted)} kills so far")
