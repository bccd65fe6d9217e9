"""Every method on every backbone builds and trains a step of each stage, or is refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.distributed.stage_runs import EVERYTHING, environment, whole
from tests.helpers import Rows, random_rows
from tests.ranks import RankPool
from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.baselines import Mix
from torchrec_mdr.compare import compatibility
from torchrec_mdr.compare.compatibility import EMBEDDING_DIM, SCHEMA, Pair, method_backbone_matrix, pair, pairs
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed.sharding import EmbeddingConfig
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.registry import BACKBONES, METHODS
from torchrec_mdr.training.config import StageConfig
from torchrec_mdr.training.stage_runtime import StageRuntime

NAMES = [feature.name for feature in SCHEMA.sparse_features]
Step = tuple[str, str, str, set[str], set[str], float]


def batch(rows: Rows, divisions: tuple[Division, ...]) -> object:
    own = Rows(rows.dense, rows.sparse % 8, rows.labels, rows.domains[:, : len(divisions)])
    made = own.batch([division.num_domains for division in divisions])
    keys = dict(zip("abc", NAMES, strict=True))
    made.sparse_features._keys = [keys[key] for key in made.sparse_features.keys()]
    return made


def train_a_step(one: Pair, stage: Stage) -> Step:
    """Method, backbone, stage, groups that it trains, groups that moved, and the loss."""
    torch.manual_seed(0)
    embeddings = EmbeddingConfig(dim=EMBEDDING_DIM, optimizer="rowwise_adagrad", sharding="table_wise")
    # weight decay moves what has no gradient yet
    runtime = StageRuntime(one.build(), stage, StageConfig(weight_decay=0.01), embeddings, None, 0, environment())
    runtime.model.start_stage(stage.route, stage.division)
    before = whole(runtime.state(EVERYTHING))
    rows = random_rows(24, SCHEMA.divisions, seed=environment().rank)
    (output,) = runtime.train(iter([batch(rows, one.divisions)]))
    after = whole(runtime.state(EVERYTHING))
    moved = {runtime.groups[name].value for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    trains = {group.value for group in stage.trains} & {group.value for group in runtime.groups.values()}
    return one.method, one.backbone, stage.name, trains, moved, float(output.loss)


def train_pairs(wanted: list[tuple[str, str]]) -> list[Step]:
    built = [pair(*names) for names in wanted]
    return [
        train_a_step(one, stage)
        for one in built
        if one.refusal is None
        for stage in METHODS[one.method]().stages(one.divisions)
    ]


def check(steps: list[Step], wanted: list[tuple[str, str]]) -> None:
    assert {step[:2] for step in steps} == set(wanted)
    for method, backbone, stage, trains, moved, loss in steps:
        assert moved == trains and 0.0 < loss < 5.0, (method, backbone, stage)


# of each kind: adapters in the backbone's layers, layers in place of the MLP, whole copies with tables
KINDS = ("multilora", "ple", "finetune")


def of_backbone(backbone: str, methods: Iterable[str] = METHODS) -> list[tuple[str, str]]:
    """The pairs with a backbone that are not refused."""
    return [(method, backbone) for method in methods if pair(method, backbone).refusal is None]


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "mlp"])
def test_each_kind_of_method_trains_a_step_of_each_stage(backbone: str, one_rank: RankPool) -> None:
    wanted = of_backbone(backbone, KINDS)
    check(one_rank.run(train_pairs, wanted)[0], wanted)


def test_every_method_trains_a_step_of_each_stage_on_one_backbone(one_rank: RankPool, two_ranks: RankPool) -> None:
    wanted = of_backbone("mlp")
    for steps in [*one_rank.run(train_pairs, wanted), *two_ranks.run(train_pairs, wanted)]:
        check(steps, wanted)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_pair_trains_a_step_of_each_stage(
    backbone: str, ranks: int, one_rank: RankPool, two_ranks: RankPool
) -> None:
    wanted = of_backbone(backbone)
    for steps in (one_rank if ranks == 1 else two_ranks).run(train_pairs, wanted):
        check(steps, wanted)


def test_the_pairs_of_this_package_all_fit() -> None:
    assert {(one.method, one.backbone): one.refusal for one in pairs() if one.refusal is not None} == {}


class Picky(Mix):
    """A method that works on one backbone, with two divisions."""

    needs_backbone_targets: ClassVar[bool] = False

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        if type(backbone).__name__ != "WDL":
            raise ValueError("picky needs wdl")
        if len(divisions) == 1:
            raise ValueError("picky needs two divisions")
        return backbone


def test_the_table_shows_what_is_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "METHODS", {"mix": Mix, "picky": Picky})
    monkeypatch.setattr(compatibility, "BACKBONES", {name: BACKBONES[name] for name in ("mlp", "wdl")})
    assert [one.refusal for one in pairs()] == [None, None, "picky needs wdl", None]
    table = method_backbone_matrix().splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["`mix`", "train", "yes", "yes"]
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == ["`picky`", "train", "no (1)", "yes"]
    assert table[-1] == "1. picky needs wdl"


def test_the_table_names_all_methods_and_backbones() -> None:
    table = method_backbone_matrix()
    assert all(f"`{name}`" in table for name in [*METHODS, *BACKBONES])
    assert "pretrain, adapt_DIVISION, fuse" in table
