"""Tables with a part per domain: which rows are looked up, what parts start from, on one rank and sharded over two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.models.dlrm import SparseArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_configs import EmbeddingConfig as SequenceConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.ranks import RankPool
from torchrec_mdr.adapters.context import DomainContext, DomainState, Route
from torchrec_mdr.baselines.domain_tables import DomainSparseArch, give_domains_tables
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.sharding import EmbeddingConfig, init_embeddings, shard
from torchrec_mdr.ops.groups import BatchDomains

N = 3
SIZES = {"a": 6, "b": 10, "c": 7}
IDS = torch.tensor([2, 0, 1, 1, 2])


def collection(device: str = "cpu", is_weighted: bool = False) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=8, num_embeddings=size, feature_names=[name])
        for name, size in SIZES.items()
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device(device), is_weighted=is_weighted)


def features(keys: tuple[str, ...] = ("a", "b", "c")) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, the same for each feature whatever the keys' order."""
    lengths = {"a": [1, 2, 0, 3, 1], "b": [1, 1, 1, 1, 1], "c": [0, 2, 2, 1, 1]}
    values = {"a": [5, 0, 1, 2, 3, 4, 0], "b": [9, 0, 3, 4, 5], "c": [6, 0, 1, 2, 3, 4]}
    return KeyedJaggedTensor.from_lengths_sync(
        list(keys),
        torch.tensor([value for key in keys for value in values[key]]),
        torch.tensor([length for key in keys for length in lengths[key]], dtype=torch.int32),
    )


def look_up(arch: DomainSparseArch, context: DomainContext, kjt: KeyedJaggedTensor, route: Route) -> Tensor:
    with context.open(DomainState(route, BatchDomains.from_ids(IDS, [N]))):
        embeddings: Tensor = arch(kjt)
    return embeddings


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("keys", [("a", "b", "c"), ("c", "a", "b")])
def test_each_row_reads_its_domains_part(keys: tuple[str, ...], with_base: bool) -> None:
    plain, context = SparseArch(collection()), DomainContext()
    arch = DomainSparseArch(plain, N, with_base, context)
    tables = arch.embedding_bag_collection.embedding_bags
    assert list(arch.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(look_up(arch, context, features(keys), Route.DOMAIN), plain(features()))
    with torch.no_grad():
        for bag in tables.values():
            bag.weight.normal_()
    kjt = features(keys)
    for route, parts in ((Route.DOMAIN, IDS + with_base), (Route.BASE, torch.zeros_like(IDS))):
        got = look_up(arch, context, kjt, route)
        for f, (name, size) in enumerate(SIZES.items()):
            for row, (bag, part) in enumerate(zip(kjt[name].to_dense(), parts.tolist(), strict=True)):
                expected = tables[f"t_{name}"].weight[bag + part * size].sum(0)
                torch.testing.assert_close(got[row, f], expected)
    assert kjt.values().max() < 10  # the caller's ids are as they were


def test_weights_of_ids_are_kept() -> None:
    plain, context = SparseArch(collection(is_weighted=True)), DomainContext()
    arch = DomainSparseArch(plain, N, False, context)
    kjt = features()
    weights = torch.rand(kjt.values().numel(), generator=torch.Generator().manual_seed(1))
    weighted = KeyedJaggedTensor(kjt.keys(), kjt.values(), weights=weights, lengths=kjt.lengths())
    got = look_up(arch, context, weighted, Route.DOMAIN)
    torch.testing.assert_close(got, plain(weighted))
    ones = KeyedJaggedTensor(kjt.keys(), kjt.values(), weights=torch.ones_like(weights), lengths=kjt.lengths())
    assert not torch.allclose(got, look_up(arch, context, ones, Route.DOMAIN))


def test_sequences_cannot_be_had_once_per_domain() -> None:
    own = SequenceConfig(name="s", embedding_dim=8, num_embeddings=6, feature_names=["a"])
    model = nn.ModuleDict({"sequences": EmbeddingCollection(tables=[own])})
    with pytest.raises(ValueError, match="the tables in 'sequences' cannot be had once per domain"):
        give_domains_tables(model, N, False, DomainContext())


def test_gradients_stay_in_the_rows_domains() -> None:
    context = DomainContext()
    arch = DomainSparseArch(SparseArch(collection()), N, True, context)
    look_up(arch, context, features(), Route.DOMAIN)[IDS != 1].square().sum().backward()
    for name, (tensor, owners) in arch.owned_tables().items():
        gradient = arch.embedding_bag_collection.get_parameter(name).grad
        assert tensor.shape == gradient.shape
        assert [bool(gradient[owners == domain].any()) for domain in (-1, 0, 1, 2)] == [False, True, False, True]


def test_start_copies_the_base_part_off_the_base_route_only() -> None:
    arch = DomainSparseArch(SparseArch(collection()), N, True, DomainContext())
    weight = arch.embedding_bag_collection.embedding_bags["t_a"].weight
    with torch.no_grad():
        weight.normal_()
    before = weight.detach().clone()
    arch.start_stage(Route.BASE, 0)
    assert torch.equal(weight, before)
    arch.start_stage(Route.DOMAIN, 0)
    assert torch.equal(weight.view(N + 1, 6, 8), before[:6].expand(N + 1, 6, 8))


def test_parts_of_domains_that_do_not_train_stay_bitwise() -> None:
    arch = DomainSparseArch(SparseArch(collection()), N, True, DomainContext())
    weights = {name: bag.weight for name, bag in arch.embedding_bag_collection.embedding_bags.items()}
    for weight in weights.values():
        nn.init.normal_(weight)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    arch.start_stage(Route.DOMAIN, 0, torch.tensor([0, 2]))
    for name, weight in weights.items():
        base, first, second, third = weight.view(N + 1, -1, 8)
        old = before[name].view(N + 1, -1, 8)
        assert torch.equal(base, old[0]) and torch.equal(second, old[2])
        assert torch.equal(first, base) and torch.equal(third, base) and not torch.equal(old[1], old[0])


def test_without_a_base_part_start_changes_nothing() -> None:
    arch = DomainSparseArch(SparseArch(collection()), N, False, DomainContext())
    weight = arch.embedding_bag_collection.embedding_bags["t_a"].weight
    with torch.no_grad():
        weight.normal_()
    before = weight.detach().clone()
    arch.start_stage(Route.DOMAIN, 0)
    assert torch.equal(weight, before)


def test_initial_values_are_spread_as_in_one_domains_table() -> None:
    arch = DomainSparseArch(SparseArch(collection("meta")), N, False, DomainContext())
    assert arch.embedding_bag_collection.embedding_bags["t_b"].weight.is_meta
    for config, size in zip(arch.embedding_bag_collection.embedding_bag_configs(), SIZES.values(), strict=True):
        assert config.num_embeddings == N * size
        assert config.get_weight_init_max() == -config.get_weight_init_min() == pytest.approx(size**-0.5)


class Wrapped(nn.Module):
    """An arch below a module, as sharding needs it."""

    def __init__(self, context: DomainContext) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(collection("meta"))
        give_domains_tables(self, N, True, context)

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        embeddings: Tensor = self.sparse_arch(kjt)
        return embeddings


def sharded(sharding: str) -> tuple[dict[str, list[int]], Tensor, Tensor, list[int]]:
    """Starts sharded tables; owners of rows by share, and lookups of two domains of the same ids."""
    context = DomainContext()
    module = Wrapped(context)
    environment = Environment(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    optimizer = "adam" if sharding == "data_parallel" else "rowwise_adagrad"
    config = EmbeddingConfig(dim=8, optimizer=optimizer, sharding=sharding)  # type: ignore[arg-type]
    model = shard(module, config, 0.1, 0.0, False, environment)
    init_embeddings(model, seed=3)
    model.eval()

    def read(domain: int, route: Route = Route.DOMAIN) -> Tensor:
        with torch.no_grad(), context.open(DomainState(route, BatchDomains.from_ids(IDS * 0 + domain, [N]))):
            return model(features()).clone()

    base, unlike = read(0, Route.BASE), read(2)
    assert not torch.allclose(base, unlike)
    others = read(0), read(2)
    module.sparse_arch.start_stage(Route.DOMAIN, 0, torch.tensor([1]))
    assert torch.equal(read(1), base) and torch.equal(read(0), others[0]) and torch.equal(read(2), others[1])
    module.sparse_arch.start_stage(Route.DOMAIN, 0)
    assert torch.equal(read(2, Route.BASE), base) and torch.equal(read(0), base)
    owned = {name: owners.tolist() for name, (_, owners) in module.sparse_arch.owned_tables().items()}
    widths = [tensor.shape[1] for tensor, _ in module.sparse_arch.owned_tables().values()]
    return owned, read(0), read(2), widths


@pytest.mark.parametrize("sharding", ["data_parallel", "table_wise", "column_wise", "row_wise"])
def test_shares_and_start_over_two_ranks(two_ranks: RankPool, sharding: str) -> None:
    ranks = two_ranks.run(sharded, sharding)
    for _, first, last, _ in ranks:
        assert torch.equal(first, last) and first.any()
    names = [name for owned, *_ in ranks for name in owned]
    if sharding == "data_parallel":
        assert ranks[0][0] == ranks[1][0] and len(set(names)) == len(SIZES)
    else:
        assert len(set(names)) == len(names)
    for name, size in SIZES.items():
        shares = [
            (owners, width)
            for owned, *_, widths in (ranks[:1] if sharding == "data_parallel" else ranks)
            for (title, owners), width in zip(owned.items(), widths, strict=True)
            if f"t_{name}." in title
        ]
        everything = [domain for domain in range(-1, N) for _ in range(size)]
        if sharding == "row_wise":
            assert [domain for owners, _ in shares for domain in owners] == everything
        else:
            assert all(owners == everything for owners, _ in shares) and sum(width for _, width in shares) == 8


def test_what_cannot_be_had_once_per_domain() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = collection()

    with pytest.raises(ValueError, match="the tables in .tables. cannot be had once per domain, not being in a"):
        give_domains_tables(Bare(), N, False, DomainContext())
    tables = [
        EmbeddingBagConfig(name=f"t{size}", embedding_dim=8, num_embeddings=size, feature_names=["a"])
        for size in (5, 6)
    ]
    with pytest.raises(ValueError, match="feature 'a' is looked up in tables of several sizes"):
        DomainSparseArch(SparseArch(EmbeddingBagCollection(tables=tables)), N, False, DomainContext())
