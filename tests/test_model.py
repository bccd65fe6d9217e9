"""A wrapped backbone against the backbone itself, and the properties that all methods share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.cases import one_at_a_time
from tests.helpers import DIVISIONS, CountOps, Rows, build_backbone, hand_built_dlrm, random_rows, randomise
from torchrec_mdr.adapters.bank import ParameterGroup
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.model import MultiDomainModel, parameter_groups
from torchrec_mdr.ops.groups import BatchDomains

METHODS: dict[str, Method] = {
    "mlora": MLoRA(rank=3),
    "single_lora": SingleLoRA(rank=3),
    "multilora": MultiLoRA(rank=3),
    "multilora_avg": MultiLoRA(rank=3, fusion="avg"),
    "moe_mlora": MoEMLoRA(rank=3, experts_per_domain=2),
    "moe_mlora_input": MoEMLoRA(rank=3, gate_input="domain_and_input", per_layer=True),
}
BACKBONES = ["mlp", "dlrm", "dlrm_dcn"]
SIZES = [division.num_domains for division in DIVISIONS]


def backbone_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return materialize_tables(build_backbone(name))


def divisions_of(method: Method, divisions: tuple[Division, ...] = DIVISIONS) -> tuple[Division, ...]:
    return divisions if isinstance(method, MultiLoRA) else divisions[:1]


def trained(backbone: nn.Module, method: Method, divisions: tuple[Division, ...] = DIVISIONS) -> MultiDomainModel:
    """A model whose adapters, gates and norms have moved away from their start, in evaluation mode."""
    model = MultiDomainModel(backbone, method, divisions_of(method, divisions)).eval()
    groups = parameter_groups(model)
    own = (ParameterGroup.ADAPTERS, ParameterGroup.GATE)
    randomise({name: tensor for name, tensor in model.state_dict().items() if groups[name] in own})
    return model


def call(model: MultiDomainModel, rows: Rows) -> Tensor:
    return model(rows.dense, rows.kjt(), rows.domains[:, : len(model.divisions)])


def plain_call(backbone: nn.Module, rows: Rows) -> Tensor:
    return backbone(dense_features=rows.dense, sparse_features=rows.kjt())


def shuffled(rows: Rows) -> Rows:
    return rows.pick(torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("crossnet", [False, True], ids=["dlrm", "dlrm_dcn"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_wrapped_dlrm_is_the_unwrapped_one_bitwise(method: Method, crossnet: bool) -> None:
    torch.manual_seed(0)
    plain, rows = hand_built_dlrm(crossnet), shuffled(random_rows(40))
    expected = plain_call(plain, rows)
    names = dict(plain.named_parameters())
    model = MultiDomainModel(plain, method, divisions_of(method))
    assert torch.equal(call(model, rows), expected) and expected.shape == (40, 1)
    now = dict(model.named_parameters())
    assert all(now[f"backbone.{name}"] is parameter for name, parameter in names.items())
    if crossnet:
        assert any("crossnet.adapters" in name for name in now)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_wrapped_mlp_is_the_unwrapped_one(method: Method) -> None:
    """Bitwise, or to float tolerance where domain norms take the place of norms that come trained."""
    plain, rows = backbone_of("mlp"), shuffled(random_rows(40))
    for _ in range(3):
        plain_call(plain, rows)  # moves the running statistics
    randomise({name: t for name, t in plain.state_dict().items() if "norm" in name and "running" not in name})
    plain.eval()
    expected = plain_call(plain, rows)
    model = MultiDomainModel(plain, method, divisions_of(method))
    for route in Route:
        model.set_route(route)
        if isinstance(method, (MultiLoRA, SingleLoRA)) and route is not Route.BASE:
            torch.testing.assert_close(call(model, rows), expected)
        else:
            assert torch.equal(call(model, rows), expected)


@one_at_a_time(method=METHODS, backbone=BACKBONES)
def test_the_base_route_is_the_backbone_bitwise(method: str, backbone: str) -> None:
    plain = backbone_of(backbone).eval()
    model, rows = trained(copy.deepcopy(plain), METHODS[method]), random_rows(40)
    assert not torch.allclose(call(model, rows), plain_call(plain, rows), atol=1e-2)
    model.set_route(Route.BASE)
    assert torch.equal(call(model, rows), plain_call(plain, rows))


@one_at_a_time(method=METHODS, backbone=BACKBONES)
def test_rows_stand_for_themselves(method: str, backbone: str) -> None:
    """Permuted rows, rows grouped by the loader, and single-domain parts give what the mixed batch gives."""
    model, rows = trained(backbone_of(backbone), METHODS[method]), random_rows(60)
    logits = call(model, rows)
    order = torch.randperm(60)
    torch.testing.assert_close(call(model, rows.pick(order)), logits[order])
    grouped = rows.batch(SIZES[: len(model.divisions)])
    torch.testing.assert_close(model(grouped.dense_features, grouped.sparse_features, grouped.domains), logits)
    for combination in rows.domains.unique(dim=0):
        part = (rows.domains == combination).all(1)
        torch.testing.assert_close(call(model, rows.pick(part)), logits[part])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_loader_and_caller_give_the_same_gradients(method: Method) -> None:
    model, rows = trained(backbone_of("mlp"), method), random_rows(60)
    order = torch.randperm(60)
    call(model, rows.pick(order)).square().sum().backward()
    unsorted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = rows.batch(SIZES[: len(model.divisions)])
    model(batch.dense_features, batch.sparse_features, batch.domains).square().sum().backward()
    grouped = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(unsorted) == set(grouped) and any("adapter" in name for name in grouped)
    for name, gradient in grouped.items():
        torch.testing.assert_close(gradient, unsorted[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_step_loops_over_domains(method: Method) -> None:
    def count(domains: int) -> int:
        divisions = divisions_of(method, (Division("scenario", domains), Division("gender", 2)))
        model = MultiDomainModel(backbone_of("mlp"), method, divisions)
        rows = random_rows(120, (Division("scenario", domains), Division("gender", 2)))
        batch = rows.batch([division.num_domains for division in divisions])
        with CountOps() as ops:
            model(batch.dense_features, batch.sparse_features, batch.domains).sum().backward()
        return ops.count

    assert 100 < count(40) == count(80)
    assert abs(count(2) - count(40)) < 10  # few domains are served by other operators


def test_ids_may_be_a_vector_where_there_is_one_division() -> None:
    model, rows = trained(backbone_of("dlrm"), METHODS["mlora"]), random_rows(20)
    vector = model(rows.dense, rows.kjt(), rows.domains[:, 0])
    assert torch.equal(vector, call(model, rows))
    assert torch.equal(vector, model(rows.dense, rows.kjt(), BatchDomains.from_ids(rows.domains[:, 0], SIZES[:1])))


@pytest.mark.parametrize("ids", [torch.zeros(20, 1).long(), torch.zeros(20).long(), torch.zeros(20, 3).long()])
def test_ids_of_a_wrong_shape_are_refused(ids: Tensor) -> None:
    model, rows = trained(backbone_of("mlp"), METHODS["multilora"]), random_rows(20)
    with pytest.raises(ValueError, match=r"domain_ids must be \[B, 2\]"):
        model(rows.dense, rows.kjt(), ids)


@pytest.mark.parametrize(("row", "division", "bad"), [(4, 0, 3), (7, 1, 2), (0, 0, -2)])
def test_domains_outside_their_division_are_refused(row: int, division: int, bad: int) -> None:
    model, rows = trained(backbone_of("mlp"), METHODS["multilora"]), random_rows(20)
    ids = rows.domains.clone()
    ids[row, division] = bad
    with pytest.raises(ValueError, match=f"domain id {bad} in row {row} is outside"):
        model(rows.dense, rows.kjt(), ids)
    call(model, rows)  # the refused pass is closed


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one division"):
        MultiDomainModel(backbone_of("mlp"), METHODS["mlora"], [])
    with pytest.raises(ValueError, match="target 'tower' matches no module"):
        MultiDomainModel(backbone_of("mlp"), METHODS["mlora"], DIVISIONS[:1], target_modules=["tower"])
    with pytest.raises(ValueError, match="Sequential does not say which layers adapters may wrap"):
        MultiDomainModel(nn.Sequential(nn.Linear(2, 1)), METHODS["mlora"], DIVISIONS[:1])


def test_targets_may_be_named() -> None:
    model = MultiDomainModel(
        hand_built_dlrm(), METHODS["mlora"], DIVISIONS[:1], target_modules=["dense_arch.*._linear", "over_arch.model.1"]
    )
    adapted = {name.rpartition(".adapter.")[0] for name, _ in model.named_parameters() if ".adapter." in name}
    layers = [f"backbone.dense_arch.model._mlp.{i}._linear" for i in range(2)]
    assert adapted == {*layers, "backbone.over_arch.model.1"}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_tensor_is_in_the_group_of_its_module(name: str) -> None:
    model = MultiDomainModel(backbone_of(name), METHODS["multilora"], DIVISIONS)
    groups = parameter_groups(model)
    assert set(groups) == {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    plain = {f"backbone.{n}" for n, _ in [*backbone_of(name).named_parameters(), *backbone_of(name).named_buffers()]}
    for tensor, group in groups.items():
        if "embedding_bags" in tensor:
            assert group is ParameterGroup.EMBEDDINGS
        elif "attention" in tensor or ".combinations." in tensor:
            assert group is ParameterGroup.GATE
        else:
            assert group is (ParameterGroup.BACKBONE if tensor in plain else ParameterGroup.ADAPTERS), tensor
    gate = parameter_groups(MultiDomainModel(backbone_of(name), METHODS["moe_mlora"], DIVISIONS[:1]))
    assert {n for n, g in gate.items() if g is ParameterGroup.GATE} == {n for n in gate if ".gate." in n} != set()


def test_another_route_is_for_a_while() -> None:
    model, rows = trained(backbone_of("mlp"), METHODS["multilora"]), random_rows(20)
    fused = call(model, rows)
    found = {}
    with model.routed(Route.DOMAIN, division=1):
        found["gender"] = call(model, rows)
        with pytest.raises(KeyError), model.routed(Route.BASE):
            found["base"] = call(model, rows)
            raise KeyError
        assert torch.equal(call(model, rows), found["gender"])  # the one before is back, whatever happened
    assert torch.equal(call(model, rows), fused)
    for name, route, division in (("gender", Route.DOMAIN, 1), ("base", Route.BASE, 0)):
        model.set_route(route, division)
        assert torch.equal(call(model, rows), found[name]) and not torch.equal(found[name], fused)


def test_the_expert_of_another_route_is_for_a_while() -> None:
    model = MultiDomainModel(backbone_of("mlp"), METHODS["moe_mlora"], DIVISIONS[:1])
    model.set_route(Route.DOMAIN, expert_index=1)
    with model.routed(Route.FUSED):
        assert (model.router.route, model.router.expert_index) == (Route.FUSED, 0)
    assert (model.router.route, model.router.division, model.router.expert_index) == (Route.DOMAIN, 0, 1)


def test_a_stage_of_some_domains_starts_theirs_alone() -> None:
    model = trained(backbone_of("mlp"), METHODS["multilora"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.start_stage(Route.DOMAIN, 0, [2, 0])
    started = {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(started) == 2 * 4 and all(".norm.domains.0." in name for name in started)  # two layers, four tensors
    for name, tensor in started.items():
        assert (tensor != before[name]).any(1).tolist() == [True, False, True], name
    model.start_stage(Route.DOMAIN, 0)
    assert all(not torch.equal(tensor[1], before[name][1]) for name, tensor in started.items())


def test_a_wrapped_backbone_is_not_wrapped_again() -> None:
    model = MultiDomainModel(backbone_of("mlp"), METHODS["mlora"], DIVISIONS[:1])
    with pytest.raises(ValueError, match="has parts for domains already"):
        MultiDomainModel(model.backbone, METHODS["mlora"], DIVISIONS[:1])


def test_missing_ids_are_named() -> None:
    model, rows = MultiDomainModel(backbone_of("mlp"), METHODS["mlora"], DIVISIONS[:1]), random_rows(20)
    with pytest.raises(ValueError, match="domain_ids is None"):
        model(rows.dense, rows.kjt(), None)
