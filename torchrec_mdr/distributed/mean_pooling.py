"""Mean pooling beside row-wise sharding, table by table."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyAwaitable, ShardingType
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

_SUMMED_OVER_RANKS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)


class MeanPoolingCollection(ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection, which divides only the sums of row-wise tables by their lists' lengths.

    Ranks that hold a part of a table's rows give sums, and TorchRec divides them at the end. Its divisor is one for all
    tables: it divides the means of tables that are not row-wise once more, and cannot be made of a batch without rows.
    """

    def __init__(self, module: Any, table_name_to_parameter_sharding: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, table_name_to_parameter_sharding, *args, **kwargs)
        self._has_mean_pooling_callback = False
        divided = {
            config.name
            for config in module.embedding_bag_configs()
            if config.pooling is PoolingType.MEAN
            and table_name_to_parameter_sharding[config.name].sharding_type in _SUMMED_OVER_RANKS
        }
        tables = {
            name: config
            for config in module.embedding_bag_configs()
            for feature in config.feature_names
            for name in (feature, f"{feature}@{config.name}")
        }
        # for each output, the feature whose lengths divide it
        self._divided_by = [
            name.split("@")[0] if tables[name].name in divided else None for name in self._embedding_names
        ]

    def input_dist(self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor) -> Any:
        """Sends ids to where their tables are, and keeps the lists' lengths."""
        if any(self._divided_by):
            ctx.divisor = self._divisor(features)
        return super().input_dist(ctx, features)

    def output_dist(self, ctx: EmbeddingBagCollectionContext, output: Any) -> LazyAwaitable[KeyedTensor]:
        """Sends embeddings to where their rows are."""
        return self._divide(ctx, super().output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: Any) -> LazyAwaitable[KeyedTensor]:
        """Looks up, and sends embeddings to where their rows are."""
        return self._divide(ctx, super().compute_and_output_dist(ctx, input))

    def _divide(self, ctx: EmbeddingBagCollectionContext, awaitable: Any) -> LazyAwaitable[KeyedTensor]:
        if any(self._divided_by):
            awaitable.callbacks.append(partial(_quotient, divisor=ctx.divisor))
        return awaitable

    @torch.no_grad()
    def _divisor(self, features: KeyedJaggedTensor) -> Tensor:
        """[rows, columns of all outputs]: lengths of lists where they divide, 1 elsewhere and for empty lists."""
        rows = features.stride()
        places = {key: place for place, key in enumerate(features.keys())}
        lengths = features.lengths().view(len(places), rows).clamp(min=1)
        columns = [
            (lengths[places[key]] if key is not None else lengths.new_ones(rows)).unsqueeze(1).expand(rows, dim)
            for key, dim in zip(self._divided_by, self._embedding_dims, strict=True)
        ]
        return torch.cat(columns, 1)


def _quotient(pooled: KeyedTensor, divisor: Tensor) -> KeyedTensor:
    return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values() / divisor, pooled.key_dim())
