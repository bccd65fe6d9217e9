"""Each baseline against its definition, computed row by row, and in a batch of several domains against single ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import CountOps, Rows, random_rows, randomise, schema_of
from torchrec_mdr.adapters import dense
from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.groups import BatchDomains
from torchrec_mdr.backbones import BACKBONES, materialize_tables
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import (
    PLE,
    Finetune,
    Hamur,
    Method,
    Mix,
    MMoE,
    Plate,
    SharedBottom,
    Single,
    Star,
)
from torchrec_mdr.model import MultiDomainModel

AGE = Division("age", 3)
HIDDEN = (6, 5)
DIM = 8
Reference = Callable[[nn.Module, Tensor, int, Tensor], Tensor]


class Built:
    """A backbone with a method's parts, every parameter and statistic random, and rows for it in no order."""

    def __init__(
        self, method: Method, batch_norm: bool = True, backbone: str = "mlp", hidden: tuple[int, ...] = HIDDEN
    ) -> None:
        torch.manual_seed(0)
        options = {} if backbone.startswith("dlrm") else {"batch_norm": batch_norm}
        plain = materialize_tables(BACKBONES[backbone](hidden=hidden, **options).build(schema_of([AGE]), DIM))
        self.model = MultiDomainModel(plain, method, [AGE])
        randomise(self.model.state_dict())
        self.model.set_route(method.route)
        self.model.eval()
        rows = random_rows(40, [AGE])
        self.rows = rows.pick(torch.randperm(40))

    def logits(self, rows: Rows | None = None) -> Tensor:
        rows = rows or self.rows
        return self.model(rows.dense, rows.kjt(), rows.domains)

    def features(self) -> Tensor:
        """What the over arch sees where tables are shared."""
        arch = self.model.backbone.sparse_arch
        return flatten(arch.embedding_bag_collection(self.rows.kjt()).values(), self.rows.dense)

    def row_by_row(self, reference: Reference) -> Tensor:
        """The over arch for one row at a time: reference(over_arch, features, domain, user)."""
        rows = zip(self.features(), self.rows.domains[:, 0].tolist(), strict=True)
        return torch.stack([reference(self.model.backbone.over_arch, x, d, x[:DIM]) for x, d in rows])


def relu_norm(h: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(weight * (h - mean) / (var + 1e-5) ** 0.5 + bias)


def plain_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A hidden layer of the backbone."""
    norm = layer.norm
    h = layer.linear.weight @ x + layer.linear.bias
    return relu_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def own_layer(layer: nn.Module, x: Tensor, d: int) -> Tensor:
    """A hidden layer of domain d."""
    norm = layer.norm
    h = layer.linear.weight[d] @ x + layer.linear.bias[d]
    return relu_norm(h, norm.running_mean[d], norm.running_var[d], norm.weight[d], norm.bias[d])


def tower(towers: nn.Module, x: Tensor, d: int) -> Tensor:
    for layer in towers.hidden:
        x = own_layer(layer, x, d)
    return towers.output.weight[d] @ x + towers.output.bias[d]


def expert(layer: nn.Module, x: Tensor, e: int) -> Tensor:
    """One hidden layer of expert e."""
    part = slice(e * layer.linear.weight.shape[1], (e + 1) * layer.linear.weight.shape[1])
    norm = layer.norm
    h = layer.linear.weight[e] @ x + layer.linear.bias[e]
    return relu_norm(h, norm.running_mean[part], norm.running_var[part], norm.weight[part], norm.bias[part])


def shared_bottom(over_arch: nn.Module, x: Tensor, d: int, user: Tensor) -> Tensor:
    for layer in over_arch.bottom:
        x = plain_layer(layer, x)
    return tower(over_arch.towers, x, d)


def mmoe(over_arch: nn.Module, x: Tensor, d: int, user: Tensor) -> Tensor:
    weights = torch.softmax(over_arch.gate.weight[d] @ x, 0)
    mixed = torch.zeros(())
    for e, weight in enumerate(weights):
        h = x
        for layer in over_arch.experts:
            h = expert(layer, h, e)
        mixed = mixed + weight * h
    return tower(over_arch.towers, mixed, d)


def ple(over_arch: nn.Module, x: Tensor, d: int, user: Tensor) -> Tensor:
    paths = [x] * (AGE.num_domains + 1)
    for level in over_arch.levels:
        sizes = level.sizes
        own = [expert(level.specific, paths[k], k).view(sizes.specific, -1) for k in range(sizes.domains)]
        shared = expert(level.shared, paths[-1], 0).view(sizes.shared, -1)
        mixed = [
            torch.softmax(level.gates.weight[k] @ paths[k], 0) @ torch.cat([own[k], shared])
            for k in range(sizes.domains)
        ]
        paths = [*mixed, torch.softmax(level.shared_gate.weight @ paths[-1], 0) @ torch.cat([*own, shared])]
    last = over_arch.last
    own_d = own_layer(last.specific, paths[d], d).view(last.sizes.specific, -1)
    shared = expert(last.shared, paths[-1], 0).view(last.sizes.shared, -1)
    x = torch.softmax(last.gate.weight[d] @ paths[d], 0) @ torch.cat([own_d, shared])
    return tower(over_arch.towers, x, d)


def star_norm(norm: nn.Module, x: Tensor, d: int) -> Tensor:
    own = norm.domains
    normed = (x - own.running_mean[d]) / (own.running_var[d] + 1e-5) ** 0.5
    return norm.weight * own.weight[d] * normed + norm.bias + own.bias[d]


def star_linear(layer: nn.Module, x: Tensor, d: int) -> Tensor:
    return (layer.shared.weight * layer.domains.weight[d]) @ x + layer.shared.bias + layer.domains.bias[d]


def star(over_arch: nn.Module, x: Tensor, d: int, user: Tensor) -> Tensor:
    h = star_norm(over_arch.norm, x, d)
    for layer in over_arch.hidden:
        h = torch.relu(star_norm(layer.norm, star_linear(layer.linear, h, d), d))
    auxiliary = over_arch.auxiliary
    seen = torch.relu(auxiliary.hidden(torch.cat([auxiliary.domains[d], x])))
    return star_linear(over_arch.output, h, d) + auxiliary.output(seen)


def hamur(over_arch: nn.Module, x: Tensor, d: int, user: Tensor) -> Tensor:
    core = over_arch.hyper_net(x[None])[0].view(over_arch.k, over_arch.k)
    inner = over_arch.over_arch
    h = x
    for layer in (inner.hidden[0], inner.hidden[1][0]):
        bank, norm = layer.linear.bank, layer.norm.bank
        h = bank.weight[d] @ h + bank.bias[d]
        h = relu_norm(h, norm.running_mean[d], norm.running_var[d], norm.weight[d], norm.bias[d])
    adapter = inner.hidden[1][1]
    down = torch.sigmoid((adapter.U1 @ core @ adapter.V1).T @ h + adapter.b1)
    up = (adapter.U2 @ core @ adapter.V2).T @ down + adapter.b2
    norm = adapter.norm
    up = norm.weight[d] * (up - norm.running_mean[d]) / (norm.running_var[d] + 1e-5) ** 0.5 + norm.bias[d]
    return inner.output.bank.weight[d] @ (up + h) + inner.output.bank.bias[d]


def plate(over_arch: nn.Module, x: Tensor, d: int, user: Tensor) -> Tensor:
    first, second = over_arch.hidden
    prompted = first.linear
    mlp = prompted.user_prompts.mlp(user)
    prompt = torch.softmax(mlp / prompted.user_prompts.temperature, 0) @ prompted.user_prompts.meta
    lengthened = torch.cat([prompted.domain_prompts.prompts[d], prompt, x])
    weight = torch.cat([prompted.tuned.prompt_weight, prompted.tuned.weight], 1)
    h, norm = weight @ lengthened + prompted.tuned.bias, first.norm
    h = relu_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return over_arch.output(plain_layer(second, h))


CASES: dict[str, tuple[Method, Reference]] = {
    "shared_bottom": (SharedBottom(), shared_bottom),
    "shared_bottom, embeddings only": (SharedBottom(num_shared_layers=0), shared_bottom),
    "shared_bottom, scores only": (SharedBottom(num_shared_layers=2), shared_bottom),
    "mmoe": (MMoE(), mmoe),
    "mmoe, five experts of two layers": (MMoE(num_experts=5, num_expert_layers=2), mmoe),
    "ple": (PLE(), ple),
    "ple, one level": (PLE(num_levels=1, num_specific_experts=2, num_shared_experts=3), ple),
    "ple, many experts": (PLE(num_specific_experts=3, num_shared_experts=2), ple),
    "star": (Star(auxiliary_hidden=7), star),
    "hamur": (Hamur(k=3, bottleneck=4, hyper_hidden=6), hamur),
    "plate": (Plate(num_meta=4, temperature=0.7), plate),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_definitions(name: str) -> None:
    method, reference = CASES[name]
    built = Built(method)
    expected = built.row_by_row(reference)
    assert expected.std() > 0.01
    torch.testing.assert_close(built.logits(), expected, atol=2e-5, rtol=1e-4)


def test_ple_with_three_levels() -> None:
    built = Built(PLE(num_levels=3), hidden=(6, 5, 4))
    torch.testing.assert_close(built.logits(), built.row_by_row(ple), atol=2e-5, rtol=1e-4)


METHODS: dict[str, Method] = {
    **{name: method for name, (method, _) in CASES.items()},
    "mix": Mix(),
    "single": Single(),
    "finetune": Finetune(),
    "finetune, layers only": Finetune(embeddings=False),
    "hamur, shared layers": Hamur(k=3, domain_layers=False),
}


@pytest.mark.parametrize("backbone", ["mlp", "dlrm_dcn"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_several_domains_is_its_single_domain_parts(name: str, backbone: str) -> None:
    built = Built(METHODS[name], backbone=backbone)
    mixed = built.logits()
    for domain in range(AGE.num_domains):
        index = built.rows.domains[:, 0] == domain
        torch.testing.assert_close(mixed[index], built.logits(built.rows.pick(index)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mix"])
def test_the_domain_matters(name: str) -> None:
    built = Built(METHODS[name])
    rows = built.rows
    moved = Rows(rows.dense, rows.sparse, rows.labels, (rows.domains + 1) % AGE.num_domains)
    assert (built.logits() != built.logits(moved)).float().mean() > 0.8  # some rows end in zeros of ReLU


@pytest.mark.parametrize("backbone", ["mlp", "dcn", "fibinet", "xdeepfm", "dlrm", "dlrm_dcn"])
@pytest.mark.parametrize("method", [Single(), Finetune()], ids=["single", "finetune"])
def test_each_domain_has_the_whole_backbone_for_itself(method: Method, backbone: str) -> None:
    """A plain backbone that is given one domain's parameters gives that domain's logits."""
    built = Built(method, backbone=backbone)
    options = {} if backbone.startswith("dlrm") else {"batch_norm": True}
    plain = materialize_tables(BACKBONES[backbone](hidden=HIDDEN, **options).build(schema_of([AGE]), DIM)).eval()
    state = {name.removeprefix("backbone."): tensor for name, tensor in built.model.state_dict().items()}
    mixed = built.logits()
    for domain in range(AGE.num_domains):
        own = {}
        for name, tensor in plain.state_dict().items():
            layer, _, role = name.rpartition(".")
            if "embedding_bags" in name:
                own[name] = state[name].view(-1, *tensor.shape)[
                    domain - AGE.num_domains
                ]  # the base part may come first
            elif role == "num_batches_tracked":
                own[name] = tensor
            else:
                own[name] = state[bank_tensor(state, layer, role)][domain]
        plain.load_state_dict(own)
        index = built.rows.domains[:, 0] == domain
        rows = built.rows.pick(index)
        torch.testing.assert_close(mixed[index], plain(rows.dense, rows.kjt()), atol=2e-5, rtol=1e-4)


def bank_tensor(state: dict[str, Tensor], layer: str, role: str) -> str:
    """The name of the stacked tensor that holds the domains' values of a layer's parameter."""
    above, _, below = layer.rpartition(".")  # parameters of a cross net lie in lists
    candidates = [
        f"{place}.{holder}.{name}"
        for place, name in ((layer, role), (above, f"{below}_{role}"))
        for holder in ("bank", "domains", "domains.0")
    ]
    (found,) = (name for name in candidates if name in state)
    return found


def test_finetune_starts_from_the_pretrained_model() -> None:
    for method in (Finetune(), Finetune(embeddings=False)):
        for backbone in ("mlp", "dlrm_dcn", "fibinet"):
            built = Built(method, backbone=backbone)
            built.model.set_route(Route.BASE)
            pretrained = built.logits()
            built.model.set_route(Route.DOMAIN)
            assert not torch.allclose(built.logits(), pretrained)
            built.model.start_stage(Route.DOMAIN, 0)
            torch.testing.assert_close(built.logits(), pretrained, atol=2e-5, rtol=1e-4)


def test_plate_starts_from_the_pretrained_model() -> None:
    torch.manual_seed(0)
    plain = materialize_tables(BACKBONES["wdl"](hidden=HIDDEN).build(schema_of([AGE]), DIM))
    model = MultiDomainModel(plain, Plate(), [AGE])
    rows = random_rows(20, [AGE])
    results = []
    for change in (False, True):
        if change:
            randomise(model.backbone.over_arch.hidden[0].linear.state_dict())
            nn.init.zeros_(model.backbone.over_arch.hidden[0].linear.tuned.prompt_weight)
            model.start_stage(Route.DOMAIN, 0)
        model.set_route(Route.BASE)
        results.append(model(rows.dense, rows.kjt(), rows.domains))
        model.set_route(Route.DOMAIN)
        results.append(model(rows.dense, rows.kjt(), rows.domains))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[3], results[2])
    assert not torch.allclose(results[0], results[2])


def test_plate_takes_the_users_features_by_name() -> None:
    built = Built(Plate(user_features=["c", "a"]))
    seen: list[Tensor] = []
    built.model.backbone.over_arch.hidden[0].linear.user_prompts.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    built.logits()
    features = built.features()
    torch.testing.assert_close(seen[0], torch.cat([features[:, 2 * DIM : 3 * DIM], features[:, :DIM]], 1))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_operators_does_not_depend_on_the_number_of_domains(
    name: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "kernel_serves", lambda x: kernel)
    counts = []
    for num_domains in (4, 40):
        division = Division("d", num_domains)
        plain = materialize_tables(
            BACKBONES["deepfm"](hidden=HIDDEN, batch_norm=True).build(schema_of([division]), DIM)
        )
        model = MultiDomainModel(plain, METHODS[name], [division])
        rows = random_rows(64, [division])
        with CountOps() as ops:
            logits = model(rows.dense, rows.kjt(), BatchDomains.from_sorted(rows.domains, [num_domains]))
            F.binary_cross_entropy_with_logits(logits[:, 0], rows.labels).backward()
        counts.append(ops.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["shared_bottom", "star", "hamur", "single", "ple, one level", "finetune"])
def test_a_row_does_no_work_for_other_domains(name: str) -> None:
    """The multiplications of matrix products do not grow with the number of domains."""
    flops = []
    for num_domains in (2, 16):
        division = Division("d", num_domains)
        plain = materialize_tables(BACKBONES["mlp"](hidden=(32, 16), batch_norm=True).build(schema_of([division]), DIM))
        model = MultiDomainModel(plain, METHODS[name], [division])
        rows = random_rows(2048, [division])
        with MatmulWork() as work:
            logits = model(rows.dense, rows.kjt(), BatchDomains.from_sorted(rows.domains, [num_domains]))
            logits.sum().backward()
        flops.append(work.total)
    one_model = 2048 * (26 * 32 + 32 * 16 + 16)
    assert 2 * one_model < flops[0] and flops[1] < 1.01 * flops[0]  # with the gradients of weights and inputs


class MatmulWork(CountOps):
    """Counts the multiplications of all products of matrices."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"):
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            right = args[2] if name in ("addmm", "baddbmm") else args[1]
            self.total += left.numel() * right.shape[-1]  # in a grouped product too, each row being in one group
        return result
