"""A frozen model gives its model's logits, in every form; a merged one, too."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import DIM
from tests.inference.models import METHODS, SCHEMA, rows_for, trained
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.baselines.star import Star
from torchrec_mdr.inference.freeze import ServingModel, freeze
from torchrec_mdr.inference.merge import merge
from torchrec_mdr.methods import MLoRA
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import BACKBONES

EACH = [(method, ("dlrm_dcn", "mlp", "dlrm")[place % 3]) for place, method in enumerate(METHODS)]
FEATURES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("method", "backbone"), EACH)
def test_frozen_gives_the_models_logits(method: str, backbone: str) -> None:
    model = trained(method, backbone)
    frozen = freeze(model, FEATURES)
    for num_rows in (1, 2, 33):
        rows = rows_for(model, num_rows)
        torch.testing.assert_close(frozen(*rows), model(*rows), rtol=2e-6, atol=2e-6)
    rows = rows_for(model, 33)
    assert model(*rows).std() > 0.01, "a constant would show nothing"
    for tensor in model.state_dict().values():  # nothing is shared
        tensor.zero_()
    assert frozen(*rows).std() > 0.01


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_every_backbone_can_be_frozen(backbone: str) -> None:
    model = trained("mlora", backbone)
    rows = rows_for(model, 9)
    frozen = freeze(model, FEATURES)
    torch.testing.assert_close(frozen(*rows), model(*rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "backbone"), EACH)
def test_unknown_domains_are_the_backbones_row_by_row(method: str, backbone: str) -> None:
    model = trained(method, backbone)
    frozen = freeze(model, FEATURES)
    dense, features, ids = rows_for(model, 33)
    mixed = ids.clone()
    unknown = torch.tensor([-1, 3, 10**9])
    mixed[:3] = unknown.unsqueeze(1)
    logits, all_unknown = frozen(dense, features, mixed), frozen(dense, features, torch.full_like(ids, -1))
    assert torch.equal(logits[:3], all_unknown[:3]), "bitwise the same form with all rows unknown"
    with model.routed(Route.BASE):
        base = model(dense, features, ids)
    torch.testing.assert_close(all_unknown, base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[3:], model(dense, features, ids)[3:], rtol=2e-6, atol=2e-6)
    assert not torch.isclose(logits[3:], base[3:]).all()


def test_a_row_known_in_some_divisions_goes_by_those() -> None:
    for method in ("multilora", "multilora_avg", "multilora_add"):
        model = trained(method, "mlp")
        dense, features, ids = rows_for(model, 33)
        ids[:5, 1] = -1
        ids[5:9, 0] = -1
        wanted = model(dense, features, ids)
        ids[:5, 1] = 2
        ids[5:9, 0] = 10**9
        torch.testing.assert_close(freeze(model, FEATURES)(dense, features, ids), wanted, rtol=1e-6, atol=1e-6)


def test_unknown_ids_have_the_tables_mean_or_the_vocabularys_unknown_row() -> None:
    model = trained("mlora", "dlrm")
    dense, features, ids = rows_for(model, 33)
    strange = copy.deepcopy(features)
    values = strange.values()
    assert values[-33:].max() < 7, "feature c"
    values[-33], values[-32], values[-31] = -1, 7, 10**9

    def with_mean(row: Tensor) -> Tensor:
        """The model where row 0 of feature c's table is another."""
        changed = copy.deepcopy(model)
        weight = changed.backbone.sparse_arch.embedding_bag_collection.embedding_bags["t_c"].weight
        weight[0] = row
        known = values.clone()
        known[-33:-30] = 0
        same = type(features)(features.keys(), known, lengths=features.lengths(), stride=33)
        return changed(dense, same, ids)[:3]

    table = model.backbone.sparse_arch.embedding_bag_collection.embedding_bags["t_c"].weight
    got = freeze(model, FEATURES)(dense, strange, ids)[:3]
    torch.testing.assert_close(got, with_mean(table.mean(0)), rtol=1e-6, atol=1e-6)
    got = freeze(model, FEATURES, {"c": 4})(dense, strange, ids)[:3]
    torch.testing.assert_close(got, with_mean(table[4]), rtol=1e-6, atol=1e-6)


def test_features_may_come_in_another_order_and_tables_in_other_widths() -> None:
    model = trained("mlora", "dlrm")
    dense, features, ids = rows_for(model, 9)
    wanted = model(dense, features, ids)
    torch.testing.assert_close(freeze(model, ["c", "a", "b"])(dense, features, ids), wanted, rtol=1e-6, atol=1e-6)
    wide = trained("mlora", "deepfm")  # which looks the same ids up in a second collection, of another width
    torch.testing.assert_close(freeze(wide)(dense, features, ids), wide(dense, features, ids), rtol=1e-6, atol=1e-6)


def test_threads_share_a_frozen_model() -> None:
    frozen = freeze(trained("multilora", "mlp"), FEATURES)
    batches = [rows_for(frozen, 33, seed) for seed in range(4)]
    wanted = [frozen(*rows) for rows in batches]
    wrong: list[int] = []

    def work(place: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(frozen(*batches[place]), wanted[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_methods_without_a_backbone_of_their_own_refuse() -> None:
    with pytest.raises(ValueError, match="Star cannot be served or merged: its .* has no adapters beside a backbone"):
        freeze(trained(Star(), "mlp"))
    tables = MultiDomainModel(
        BACKBONES["dlrm"](hidden=(10, 5)).build(SCHEMA, DIM), MLoRA(rank=2), SCHEMA.divisions[:1], banks="sharded"
    )
    for serve in (freeze, lambda model: merge(model, ["cart"])):
        with pytest.raises(ValueError, match="with sharded banks cannot be served or merged as it is; build it with"):
            serve(tables)
    joint = freeze(trained(MLoRA(rank=2, schedule="joint"), "mlp"), FEATURES)
    dense, features, ids = rows_for(joint, 9)
    joint(dense, features, ids)
    with pytest.raises(ValueError, match="unknown, and the method was trained without a backbone"):
        joint(dense, features, torch.full_like(ids, 3))


MERGED = [(m, b) for m in METHODS for b in ("mlp", "dlrm_dcn") if m not in ("multilora", "moe_mlora_input")]


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(("method", "backbone"), MERGED)
def test_merged_equals_unmerged(method: str, backbone: str, double: bool) -> None:
    model = trained(method, backbone)
    dense, features, ids = rows_for(model, 33)
    bound = 2e-6
    if double:
        model, dense, bound = model.double(), dense.double(), 1e-14
        model.backbone.sparse_arch.embedding_bag_collection = _Double(
            model.backbone.sparse_arch.embedding_bag_collection
        )
    for domains in ([1, 1], [2, 0], [-1, -1]):
        chosen = domains[: len(model.divisions)]
        plain = merge(model, [None if domain < 0 else domain for domain in chosen])
        wanted = model(dense, features, torch.tensor(chosen).expand_as(ids))
        torch.testing.assert_close(plain(dense, features), wanted, rtol=bound, atol=bound)


class _Double(nn.Module):
    """TorchRec's collection makes float32 of what it looks up; this undoes that for the layers behind."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables.float()

    def forward(self, features: object) -> object:
        found = self.tables(features)
        return type(found)(found.keys(), found.length_per_key(), found.values().double())


def test_a_merged_model_is_a_plain_backbone() -> None:
    model: MultiDomainModel = trained("multilora_avg", "mlp")
    plain = merge(model, ["cart", "m"])
    fresh = materialize_tables(BACKBONES["mlp"](hidden=(10, 5), batch_norm=True).build(SCHEMA, DIM)).eval()
    fresh.load_state_dict(plain.state_dict())
    dense, features, _ = rows_for(model, 9)
    assert torch.equal(fresh(dense, features), plain(dense, features))


def test_what_depends_on_the_row_cannot_be_merged() -> None:
    with pytest.raises(
        ValueError, match="fusion by attention weighs .* by the row.* --method_options.fusion avg or add"
    ):
        merge(trained("multilora", "mlp"), ["cart", "m"])
    model = trained("multilora", "mlp")
    dense, features, ids = rows_for(model, 9)
    alone = torch.tensor([1, -1]).expand_as(ids)  # one division that knows the domain has all the weight
    torch.testing.assert_close(merge(model, ["cart", None])(dense, features), model(dense, features, alone))
    with pytest.raises(ValueError, match="the gate weighs the experts by the row"):
        merge(trained("moe_mlora_input", "mlp"), ["cart"])
    with pytest.raises(ValueError, match="division 'scenario' has no domain 'till'; it has home, cart, search"):
        merge(trained("mlora", "mlp"), ["till"])
    with pytest.raises(ValueError, match=r"of each division \(scenario\), not 2; .* as --domain '\[\"home\"\]'"):
        merge(trained("mlora", "mlp"), ["cart", "m"])


def test_mix_serves_any_domain() -> None:
    from torchrec_mdr.baselines.mix import Mix

    model = trained(Mix(), "mlp")
    frozen: ServingModel = freeze(model, FEATURES)
    dense, features, ids = rows_for(model, 9)
    torch.testing.assert_close(frozen(dense, features, ids + 7), model(dense, features, ids), rtol=1e-6, atol=1e-6)
