"""Rows left out of the embeddings, against tables that are moved by hand for one row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers import DIM, DIVISIONS, Rows, build_backbone, random_rows, schema_of
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.groups import BatchDomains
from torchrec_mdr.backbones import BACKBONES, materialize_tables
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed.left_out import STRENGTHS, LeftOut
from torchrec_mdr.distributed.pipeline import LossArch, TrainModule
from torchrec_mdr.distributed.runtime import _sparse_archs
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.model import MultiDomainModel

DIVISION = DIVISIONS[:1]
CPU = torch.device("cpu")


def build(backbone: str, dropout: float = 0.0) -> MultiDomainModel:
    """A model whose every tensor is random, with frozen tables."""
    torch.manual_seed(3)
    if dropout:
        plain = BACKBONES[backbone](hidden=(10, 5), dropout=dropout).build(schema_of(), DIM)
    else:
        plain = build_backbone(backbone)
    model = MultiDomainModel(materialize_tables(plain), MLoRA(rank=2), DIVISION)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.8)
    return model


def batch_of(rows: Rows, places: torch.Tensor | None = None) -> DomainBatch:
    """The rows as the pipeline gets them."""
    domains = BatchDomains.from_ids(rows.domains[:, :1], [DIVISION[0].num_domains])
    return DomainBatch(rows.dense, rows.kjt(), rows.labels, domains, len(rows), places)


def by_hand(model: MultiDomainModel, rows: Rows, i: int, strength: float, l2: float) -> torch.Tensor:
    """Row i's logit under tables that have been moved along the gradient of that row's loss."""
    moved = copy.deepcopy(model)
    row = rows.pick(slice(i, i + 1))
    moved.set_route(Route.BASE)
    logit = moved(row.dense, row.kjt(), row.domains[:, :1]).reshape(-1)
    loss = nn.functional.binary_cross_entropy_with_logits(logit, row.labels)
    for name, table in moved.named_parameters():
        if "embedding_bags" in name:
            loss = loss + l2 * table[row.sparse[0, "abc".index(name.split(".")[-2][-1])]].square().sum()
    loss.backward()
    with torch.no_grad():
        for name, table in moved.named_parameters():
            if "embedding_bags" in name:
                feature = "abc".index(name.split(".")[-2][-1])
                count = int((rows.sparse[:, feature] == row.sparse[0, feature]).sum())
                table += strength / count * table.grad
        moved.set_route(Route.DOMAIN)
        return moved(row.dense, row.kjt(), row.domains[:, :1]).reshape(-1)


@pytest.mark.parametrize("backbone", ["mlp", "dlrm", "dlrm_dcn"])
def test_rows_see_tables_without_their_own_share(backbone: str) -> None:
    rows, model = random_rows(24, seed=1), build(backbone).eval()
    expected = torch.cat([by_hand(model, rows, i, 0.7, 0.3) for i in range(len(rows))])
    plain = model(rows.dense, rows.kjt(), rows.domains[:, :1]).reshape(-1)
    left_out = LeftOut(model, _sparse_archs(model), 0.3)
    left_out.count([batch_of(rows.pick(slice(0, 10))), batch_of(rows.pick(slice(10, None)))], CPU)
    left_out.strength = 0.7
    left_out.eval()
    module = TrainModule(model, LossArch(), None, left_out)
    module.training = True  # of the module alone: norms keep their statistics, as in a stage that freezes them
    _, output = module(batch_of(rows))
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    assert (output.logits - plain).abs().max() > 0.01
    module.training = False
    torch.testing.assert_close(module(batch_of(rows))[1].logits, plain)


def test_the_strength_meets_the_target() -> None:
    rows, model = random_rows(24, seed=1), build("mlp").eval()
    left_out = LeftOut(model, _sparse_archs(model))
    module = TrainModule(model, LossArch(), None, left_out).eval()
    left_out.count([batch_of(rows)], CPU)
    model.set_route(Route.BASE)
    with torch.no_grad():
        seen = float(module(batch_of(rows))[0])
    for target, moved in ((seen + 0.05, True), (seen - 0.05, False)):
        left_out.start_calibration(CPU)
        module(batch_of(rows))
        left_out.finish_calibration(target)
        assert (0 < left_out.strength < STRENGTHS[-1]) if moved else left_out.strength == 0.0
    left_out.start_calibration(CPU)
    module(batch_of(rows))
    left_out.finish_calibration(seen + 0.05)
    module.training = True
    assert float(module(batch_of(rows))[0].detach()) == pytest.approx(seen + 0.05, abs=0.01)


@pytest.mark.parametrize("backbone", ["mlp", "wdl"])  # one lookup, and two of different widths
def test_what_is_kept_is_what_a_second_pass_sees(backbone: str) -> None:
    rows, model = random_rows(24, seed=1), build(backbone, dropout=0.5)
    left_out = LeftOut(model, _sparse_archs(model))
    module = TrainModule(model, LossArch(), None, left_out)
    left_out.count([batch_of(rows)], CPU)
    left_out.strength = 0.7
    places = torch.randperm(24)
    first, later = places[:10], places[10:]

    def step(chosen: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        loss, output = module(batch_of(rows.pick(chosen), chosen))
        adapters = [parameter for name, parameter in model.named_parameters() if ".adapter." in name]
        return output.logits, list(torch.autograd.grad(loss, adapters))

    module.train()
    seen = {name: step(chosen) for name, chosen in (("first", first), ("later", later))}
    module.eval()
    assert left_out.start_keeping(24, CPU)
    for chosen in (first, later):
        module(batch_of(rows.pick(chosen), chosen))
    left_out.finish_keeping()
    module.train()
    for name, chosen in (("first", first), ("later", later)):
        logits, grads = step(chosen)
        torch.testing.assert_close(logits, seen[name][0], rtol=1e-4, atol=1e-5)
        for one, other in zip(grads, seen[name][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    module.eval()  # evaluation looks up what is there
    model.set_route(Route.BASE)
    plain = model(rows.dense, rows.kjt(), rows.domains[:, :1]).reshape(-1)
    torch.testing.assert_close(module(batch_of(rows, torch.arange(24)))[1].logits, plain)


def test_what_does_not_fit_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mlp")
    left_out = LeftOut(model, _sparse_archs(model))
    assert not left_out.start_keeping(None, CPU) and not left_out.preparing
    monkeypatch.setattr("torchrec_mdr.distributed.left_out.KEPT_BYTES", 100)
    assert not left_out.start_keeping(24, CPU) and not left_out.kept
