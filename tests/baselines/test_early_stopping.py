"""Where every domain has embeddings of its own, they belong to what is kept as its best state, however sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.stage_runs import (
    ADAM,
    EVERYTHING,
    ROWWISE,
    SETTINGS,
    Job,
    batches,
    jobs,
    make_runtime,
    some_rows,
    whole,
)
from tests.ranks import RankPool
from torchrec_mdr.baselines import Finetune, Single
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.training.early_stopping import BestPerDomain

N = 3
AUC = [[0.9, 0.6, 0.5], [0.8, 0.7, 0.6], [0.7, 0.6, 0.8]]  # domain d is at its best after step d


def select(job: Job, folder: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, bool], bool]:
    """Trains and validates three times; states, result, what trains, whether a checkpoint gives back what is kept."""
    runtime = make_runtime(job)
    states = [whole(runtime.state(EVERYTHING))]
    selection = BestPerDomain(runtime.prepared.owned_rows(N, 0), torch.ones(N, dtype=torch.bool), patience=9)
    for rows, auc in zip(some_rows(3), AUC, strict=True):
        list(runtime.train(batches(job, [rows])))
        states.append(whole(runtime.state(EVERYTHING)))
        selection.update(0.0, torch.tensor(auc, dtype=torch.float64))
    checkpoint.save(folder, selection.tensors(), {})
    restored = BestPerDomain(runtime.prepared.owned_rows(N, 0), torch.zeros(N, dtype=torch.bool), patience=1)
    restored.restore(selection.info(), checkpoint.load_new(folder, "", torch.device("cpu")))
    same = all(torch.equal(restored.kept[name], tensor) for name, tensor in selection.kept.items())
    same = same and torch.equal(restored.best, selection.best) and not restored.done
    selection.put_back()
    trained = {name: group in job.stage.trains for name, group in runtime.groups.items()}
    return states, whole(runtime.state(EVERYTHING)), trained, same


@pytest.mark.parametrize("method", [Single(), Finetune(), Finetune(embeddings=False)])
@pytest.mark.parametrize("embeddings", [ADAM, ROWWISE], ids=["data_parallel", "sharded"])
def test_each_domain_gets_its_own_best_state_back(
    method: Single | Finetune, embeddings: object, two_ranks: RankPool, tmp_path: Path
) -> None:
    job = jobs(method, embeddings=embeddings, settings=SETTINGS)[-1]  # weight decay moves all of a table
    for states, result, trained, same in two_ranks.run(select, job, str(tmp_path / "kept")):
        assert same
        for name, tensor in result.items():
            if not trained[name]:
                assert torch.equal(tensor, states[-1][name]), name
                continue
            base = ".t_" in name and isinstance(method, Finetune)  # the pretrained part comes first, and stays
            parts = [t.view(N + base, -1) for t in (tensor, *(state[name] for state in states))]
            if base:
                assert torch.equal(parts[0][0], parts[1][0]), name
                assert torch.equal(parts[0][0], parts[-1][0]) == (embeddings is ROWWISE), name
            for domain in range(N):
                assert torch.equal(parts[0][domain - N], parts[2 + domain][domain - N]), (name, domain)
            assert not torch.equal(tensor, states[-1][name]), name
    assert sum(".t_" in name and trained[name] for name in result) == (0 if method == Finetune(embeddings=False) else 3)
