"""What each baseline is by its definition, one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers import Rows, random_rows, randomise, schema_of
from torchrec_mdr.backbones import materialize_tables
from torchrec_mdr.backbones.layers import flatten
from torchrec_mdr.baselines import PLE, Hamur, MMoE, Plate, SharedBottom, Star
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import Method
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import BACKBONES

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
