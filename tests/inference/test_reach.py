"""Blocks of domains behind a top-k gate choose as the gate does that has all domains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchrec_mdr.adapters.expert_gate import ExpertGate
from torchrec_mdr.inference import reach
from torchrec_mdr.inference.reach import Reach


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (1, 4), (2, 5)])
def test_a_gate_of_those_alone_chooses_the_same(
    experts: int, top_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    count = 40
    gate = ExpertGate(count, count * experts, None)
    state = {f"layer.gate.{name}": tensor for name, tensor in gate.state_dict().items()}
    dcp.save(state, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    monkeypatch.setattr(
        reach, "_whole_gate", lambda experiment: ("layer", ExpertGate(count, count * experts, None), top_k)
    )
    own = (7, 3, 30)
    chosen = Reach(None, str(tmp_path / "c")).fill(own, top_k * len(own))  # type: ignore[arg-type]
    assert chosen[: len(own)] == own and len(set(chosen)) == len(chosen) == top_k * len(own)
    part = ExpertGate(len(chosen), len(chosen) * experts, None)
    for name, tensor in part.state_dict().items():
        part.load_old_domains(name, gate.state_dict()[name], tensor, torch.tensor(chosen))
    found, weights = part.choose(None, torch.arange(len(own)), top_k)
    wanted, expected = gate.choose(None, torch.tensor(own), top_k)
    there = torch.tensor(chosen)[found % len(chosen)] + found // len(chosen) * count
    order, other = there.argsort(1), wanted.argsort(1)
    assert torch.equal(there.gather(1, order), wanted.gather(1, other))
    torch.testing.assert_close(weights.gather(1, order), expected.gather(1, other))
    assert len(Reach(None, str(tmp_path / "c")).fill(own, 1000)) == count  # type: ignore[arg-type]
