"""Rows left out of the embeddings, against tables that are moved by hand for one row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers import DIM, DIVISIONS, Rows, build_backbone, random_rows, schema_of
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed.pipeline import LossArch, MultiDomainTrain
from torchrec_mdr.experiments.leave_one_out.curvature import MOST_LEVERAGE, RIDGE, Curvature
from torchrec_mdr.experiments.leave_one_out.hook import LeaveOneOut
from torchrec_mdr.experiments.leave_one_out.scale import SCALES
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.groups import BatchDomains
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.training.stage_runtime import _sparse_archs

DIVISION = DIVISIONS[:1]
CPU = torch.device("cpu")


def build(backbone: str, dropout: float = 0.0) -> MultiDomainModel:
    """A model whose every tensor is random, with frozen tables."""
    torch.manual_seed(0)
    if dropout:
        plain = BACKBONES[backbone](hidden=(10, 5), dropout=dropout).build(schema_of(), DIM)
    else:
        plain = build_backbone(backbone)
    model = MultiDomainModel(materialize_tables(plain), MLoRA(rank=2), DIVISION)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def batch_of(rows: Rows, places: torch.Tensor | None = None) -> DomainBatch:
    """The rows as the pipeline gets them."""
    domains = BatchDomains.from_ids(rows.domains[:, :1], [DIVISION[0].num_domains])
    return DomainBatch(rows.dense, rows.kjt(), rows.labels, domains, len(rows), places)


L2 = 1.0


def slopes(model: MultiDomainModel, rows: Rows, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Row i's logit on the backbone's route, and its derivative by each table."""
    row = rows.pick(slice(i, i + 1))
    tables = {name: table for name, table in model.named_parameters() if "embedding_bags" in name}
    model.set_route(Route.BASE)
    logit = model(row.dense, row.kjt(), row.domains[:, :1]).reshape(())
    return logit.detach(), dict(zip(tables, torch.autograd.grad(logit, list(tables.values())), strict=True))


def by_hand(model: MultiDomainModel, rows: Rows, i: int, scale: float) -> torch.Tensor:
    """Row i's logit under tables that have made a Newton step on the loss of the other rows, id by id."""
    moved = copy.deepcopy(model)
    all_slopes = [slopes(model, rows, j) for j in range(len(rows))]
    for name, table in moved.named_parameters():
        if "embedding_bags" not in name:
            continue
        ids = rows.sparse[:, "abc".index(name.split(".")[-2][-1])]
        roots = [
            (torch.sigmoid(z) * torch.sigmoid(-z)).sqrt() * by[name][ids[j]] for j, (z, by) in enumerate(all_slopes)
        ]
        whole = torch.zeros(*table.shape, table.shape[1])
        for j, root in enumerate(roots):
            whole[ids[j]] += torch.outer(root, root) + 2 * L2 * torch.eye(len(root))
        ridge = RIDGE * whole.diagonal(dim1=1, dim2=2).mean() * torch.eye(table.shape[1])
        logit, by = all_slopes[i]
        gradient = (torch.sigmoid(logit) - rows.labels[i]) * by[name][ids[i]] + 2 * L2 * table.detach()[ids[i]]
        others = whole[ids[i]] - torch.outer(roots[i], roots[i]) + ridge
        assert roots[i] @ torch.linalg.solve(others + torch.outer(roots[i], roots[i]), roots[i]) < MOST_LEVERAGE
        with torch.no_grad():
            table[ids[i]] += scale * torch.linalg.solve(others, gradient)
    row = rows.pick(slice(i, i + 1))
    moved.set_route(Route.DOMAIN)
    with torch.no_grad():
        return moved(row.dense, row.kjt(), row.domains[:, :1]).reshape(-1)


def measured(left_out: LeaveOneOut, module: MultiDomainTrain, batches: list[DomainBatch]) -> None:
    """Adds up the curvature of some batches."""
    module.eval()
    left_out.start_measuring(batches[0], CPU)
    for batch in batches:
        module(batch)
    left_out.finish_measuring()


@pytest.mark.parametrize("backbone", ["mlp", "dlrm", "dlrm_dcn"])
def test_rows_see_tables_without_their_own_share(backbone: str) -> None:
    rows, model = random_rows(24, seed=1), build(backbone).eval()
    expected = torch.cat([by_hand(model, rows, i, 0.7) for i in range(len(rows))])
    model.set_route(Route.DOMAIN)
    plain = model(rows.dense, rows.kjt(), rows.domains[:, :1]).reshape(-1)
    left_out = LeaveOneOut(model, _sparse_archs(model), L2)
    module = MultiDomainTrain(model, "domains", loss=LossArch(), hooks=[left_out])
    measured(left_out, module, [batch_of(rows.pick(slice(0, 10))), batch_of(rows.pick(slice(10, None)))])
    left_out.scale = 0.7
    left_out.training = True  # of the hook alone: norms keep their statistics, as in a stage that freezes them
    _, output = module(batch_of(rows))
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    assert (output.logits - plain).abs().max() > 0.003  # a hundred times what is tolerated
    left_out.training = False
    torch.testing.assert_close(module(batch_of(rows))[1].logits, plain)


def test_the_scale_meets_the_target() -> None:
    rows, model = random_rows(24, seed=1), build("mlp").eval()
    left_out = LeaveOneOut(model, _sparse_archs(model))
    module = MultiDomainTrain(model, "domains", loss=LossArch(), hooks=[left_out])
    measured(left_out, module, [batch_of(rows)])
    model.set_route(Route.BASE)
    with torch.no_grad():
        seen = float(module(batch_of(rows))[0])
    for target, moved in ((seen + 0.05, True), (seen - 0.05, False)):
        left_out.start_calibration(CPU)
        module(batch_of(rows))
        left_out.finish_calibration(target)
        assert (0 < left_out.scale < SCALES[-1]) if moved else left_out.scale == 0.0
    left_out.start_calibration(CPU)
    module(batch_of(rows))
    left_out.finish_calibration(seen + 0.05)
    left_out.training = True
    assert float(module(batch_of(rows))[0].detach()) == pytest.approx(seen + 0.05, abs=0.03)


@pytest.mark.parametrize("backbone", ["mlp", "wdl"])  # one lookup, and two of different widths
def test_what_is_kept_is_what_a_second_pass_sees(backbone: str) -> None:
    rows, model = random_rows(24, seed=1), build(backbone, dropout=0.5)
    left_out = LeaveOneOut(model, _sparse_archs(model))
    module = MultiDomainTrain(model, "domains", loss=LossArch(), hooks=[left_out])
    measured(left_out, module, [batch_of(rows)])
    left_out.scale = 0.7
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
    left_out = LeaveOneOut(model, _sparse_archs(model))
    assert not left_out.start_keeping(None, CPU) and left_out.task is None
    monkeypatch.setattr("torchrec_mdr.experiments.leave_one_out.second_pass.KEPT_BYTES", 100)
    assert not left_out.start_keeping(24, CPU) and not left_out.kept


def test_a_diagonal_is_that_of_the_blocks() -> None:
    torch.manual_seed(0)
    ids, roots, gradients = torch.tensor([0, 1, 0, 0]), 0.1 * torch.randn(4, 3), torch.randn(4, 3)
    rough = Curvature(2, 3, CPU, diagonal=True)
    rough.add(ids, roots, torch.full((4,), 0.5))
    rough.finish()
    for row, i in enumerate(ids):
        others = sum(roots[j] ** 2 + 0.5 for j in range(4) if ids[j] == i) - MOST_LEVERAGE * roots[row] ** 2
        move = rough.leave_out(ids[row : row + 1], roots[row : row + 1], gradients[row : row + 1])
        torch.testing.assert_close(move[0], gradients[row] / others, rtol=1e-3, atol=1e-5)


def test_large_tables_have_diagonals(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = random_rows(24, seed=1), build("mlp")
    left_out = LeaveOneOut(model, _sparse_archs(model), L2)
    module = MultiDomainTrain(model, "domains", loss=LossArch(), hooks=[left_out])
    moves = []
    for most in (1 << 30, 100):
        monkeypatch.setattr("torchrec_mdr.experiments.leave_one_out.lookup.CURVATURE_BYTES", most)
        measured(left_out, module, [batch_of(rows)])
        assert [c.diagonal for c in left_out._lookups[0].curvatures.values()] == [most == 100] * 3
        left_out.scale = 1.0
        moves.append(module.train()(batch_of(rows))[1].logits)
    assert not torch.equal(*moves) and (moves[0] - moves[1]).abs().max() < 1.0


def test_a_bag_moves_by_its_ids() -> None:
    """A feature with several ids a row: every id makes its own step, and the bag their sum or mean."""
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from torchrec_mdr.experiments.leave_one_out.lookup import Lookup

    torch.manual_seed(0)
    features = KeyedJaggedTensor(["tags"], torch.tensor([0, 1, 1, 2, 0]), lengths=torch.tensor([2, 0, 3]))
    for pooling in (PoolingType.SUM, PoolingType.MEAN):
        table = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=3, feature_names=["tags"], pooling=pooling)
        arch = nn.Module()
        arch.collection = EmbeddingBagCollection(tables=[table])
        lookup = Lookup(arch)
        lookup.start_measuring(CPU)
        roots, gradients = 0.3 * torch.randn(3, 1, 4), torch.randn(3, 1, 4)
        lookup.measure(features, roots, 0.5)
        curvature = lookup.curvatures["tags"]
        curvature.finish()
        moves = lookup.moves(features, roots, gradients)
        for row, ids in enumerate(([0, 1], [], [1, 2, 0])):
            share = 1.0 if pooling is PoolingType.SUM or not ids else 1.0 / len(ids)
            steps = [curvature.leave_out(torch.tensor([i]), share * roots[row], share * gradients[row])[0] for i in ids]
            expected = share * torch.stack(steps).sum(0) if ids else torch.zeros(4)
            torch.testing.assert_close(moves[row, 0], expected)
