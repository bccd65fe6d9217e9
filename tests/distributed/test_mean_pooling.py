"""Lists that are pooled by their mean: the same for every mix of shardings."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.distributed.stage_runs import environment, whole
from tests.ranks import RankPool
from torchrec_mdr.distributed.sharding import EmbeddingConfig, Sharding, init_embeddings, shard

KINDS: tuple[Sharding, ...] = ("table_wise", "row_wise", "column_wise")
FEATURES = {"list": PoolingType.MEAN, "further": PoolingType.MEAN, "one": PoolingType.SUM}


def collection(device: str) -> EmbeddingBagCollection:
    """Two features with lists, pooled by mean, and a sum; wide enough for column-wise sharding to cut."""
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", embedding_dim=256, num_embeddings=20, feature_names=[f], pooling=pooling)
        for f, pooling in FEATURES.items()
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device(device))


def ids(rows: int, seed: int) -> KeyedJaggedTensor:
    """Lists of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES) * rows,), generator=generator)
    values = torch.randint(20, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(list(FEATURES), values, lengths=lengths)


class Pooled(nn.Module):
    def __init__(self, tables: EmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = self.tables(features)
        return torch.cat([pooled[feature] for feature in FEATURES], 1)


def furthest(kinds: tuple[Sharding, ...], rows_of_ranks: tuple[int, int]) -> tuple[float, float]:
    """The largest difference from the plain collection: of pooled embeddings, and of rows after a step of SGD."""
    config = EmbeddingConfig(256, "sgd", "auto", dict(zip(FEATURES, kinds, strict=True)))
    model = shard(Pooled(collection("meta")), config, 0.5, 0.0, False, environment())
    init_embeddings(model, 0)
    plain = Pooled(collection("cpu"))
    plain.load_state_dict(whole(dict(model.state_dict())))
    batches = [ids(rows, seed) for seed, rows in enumerate(rows_of_ranks)]
    found = model(batches[dist.get_rank()])
    # the plain collection cannot look up no rows at all
    wanted = [plain(batch) if batch.stride() else found.new_zeros(0, found.shape[1]) for batch in batches]
    off = (found - wanted[dist.get_rank()]).abs().max().item() if found.numel() else 0.0
    found.square().sum().backward()
    sum(one.square().sum() for one in wanted).backward()  # type: ignore[union-attr]
    after = whole(dict(model.state_dict()))
    steps = [
        (after[name] - (table - 0.5 * table.grad / dist.get_world_size())).abs().max().item()
        for name, table in plain.named_parameters()
        if table.grad is not None
    ]
    return off, max(steps)


def test_a_mix_of_shardings_gives_what_the_plain_collection_gives(two_ranks: RankPool) -> None:
    for kinds in product(KINDS, repeat=3):
        rows = (5, 0) if kinds[0] == kinds[1] else (5, 3)  # a rank may have none
        for off, step in two_ranks.run(furthest, kinds, rows):
            assert off < 1e-6 and step < 1e-6, kinds
