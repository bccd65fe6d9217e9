"""Baselines under torch.compile: one graph, and what eager code gives."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers import DIVISIONS, build_backbone
from tests.test_compiled import inputs
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import METHODS

BASELINES = [name for name, method in METHODS.items() if method.is_baseline]
SHORT = "star"


@pytest.mark.parametrize(
    "name", [SHORT, *(pytest.param(name, marks=pytest.mark.full) for name in BASELINES if name != SHORT)]
)
@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.full)], ids=["training", "evaluation"]
)
def test_a_baseline_compiles_to_one_graph(name: str, training: bool) -> None:
    torch.manual_seed(0)
    method = METHODS[name]()
    eager = MultiDomainModel(build_backbone("mlp"), method, DIVISIONS[: method.min_divisions])
    materialize_tables(eager)
    model = copy.deepcopy(eager.train(training))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (9, 14):
        batch = inputs(model, num_rows, unknown=False)
        y, wanted = compiled(*batch), eager(*batch)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        if training:
            y.square().sum().backward()
            wanted.square().sum().backward()
    for (own, one), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        ours, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (one, other))  # what nobody takes
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=own)
