"""Embedding tables as they serve: one matrix, one lookup, and a row for ids that no table has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class ServedTables(nn.Module):
    """An :class:`EmbeddingBagCollection` for evaluation, in PyTorch's own operators alone.

    All tables of a width lie in one matrix, each followed by the mean of its rows. An id outside its table is looked up
    as the feature's unknown id where the vocabulary has one, else as that mean.

    Args:
        tables (EmbeddingBagCollection): its weights are copied.
        keys (Sequence[str]): the features in the order in which batches hold them.
        unknown_ids (Mapping[str, int] | None): the id that stands for unknown ones, by feature.
        mean_ids (Mapping[str, int] | None): an id that is looked up as the mean, by feature: that of unknown ones where
            training had none.

    Raises:
        ValueError: the collection weighs ids, or looks up a feature that is not among the keys.
    """

    def __init__(
        self,
        tables: EmbeddingBagCollection,
        keys: Sequence[str],
        unknown_ids: Mapping[str, int] | None = None,
        mean_ids: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if tables.is_weighted():
            raise ValueError("an EmbeddingBagCollection with is_weighted=True cannot be served; leave the weights out")
        self.keys = tuple(keys)
        configs = tables.embedding_bag_configs()
        self.names = [name for names in get_embedding_names_by_table(configs) for name in names]
        weights = {config.name: tables.embedding_bags[config.name].weight for config in configs}
        self.widths = [config.embedding_dim for config in configs for _ in config.feature_names]
        self.lookups = nn.ModuleList()
        places: list[tuple[int, int]] = []  # of each output: its lookup, and its feature among the keys
        by_width: dict[int, list[EmbeddingBagConfig]] = {}
        for config in configs:
            by_width.setdefault(config.embedding_dim, []).append(config)
        for same in by_width.values():
            self.lookups.append(_Lookup(same, weights, self.keys, unknown_ids or {}, mean_ids or {}))
        order = list(by_width)
        for config in configs:
            for feature in config.feature_names:
                places.append((order.index(config.embedding_dim), self.keys.index(feature)))
        self.places = places

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Ids of B rows -> pooled embeddings [B, sum of widths]."""
        if tuple(features.keys()) != self.keys:
            features = features.permute([features.keys().index(key) for key in self.keys])
        pooled = [lookup(features.values(), features.lengths(), features.stride()) for lookup in self.lookups]
        values = torch.cat([pooled[lookup][place] for lookup, place in self.places], 1)
        return KeyedTensor(keys=self.names, values=values, length_per_key=self.widths)

    def quantize(self) -> None:
        """Keeps rows as one byte a number, with a scale and an offset a row."""
        for lookup in self.lookups:
            assert isinstance(lookup, _Lookup)
            lookup.quantize()


class _Lookup(nn.Module):
    """The tables of one width."""

    def __init__(
        self,
        configs: Sequence[EmbeddingBagConfig],
        weights: Mapping[str, Tensor],
        keys: tuple[str, ...],
        unknown_ids: Mapping[str, int],
        mean_ids: Mapping[str, int],
    ) -> None:
        super().__init__()
        start, sizes, unknown, is_mean = [0] * len(keys), [0] * len(keys), [0] * len(keys), [False] * len(keys)
        hidden = [mean_ids.get(feature, -1) for feature in keys]
        used: set[str] = set()
        matrices: list[Tensor] = []
        place = 0
        for config in configs:
            weight = weights[config.name].detach()
            for feature in config.feature_names:
                if feature not in keys:
                    raise ValueError(f"table '{config.name}' looks up feature '{feature}', which rows do not have")
                if feature in used:
                    raise ValueError(
                        f"feature '{feature}' is looked up in two tables of one collection; serve it from one"
                    )
                used.add(feature)
                at = keys.index(feature)
                start[at], sizes[at] = place, len(weight)
                unknown[at] = unknown_ids.get(feature, len(weight))
                is_mean[at] = config.pooling is PoolingType.MEAN
            matrices += [weight, weight.mean(0, keepdim=True)]
            place += len(weight) + 1
        self.pools_mean = any(is_mean)
        self.register_buffer("weight", torch.cat(matrices))
        device = self.get_buffer("weight").device
        self.register_buffer("start", torch.tensor(start, device=device))
        self.register_buffer("sizes", torch.tensor(sizes, device=device))
        self.register_buffer("unknown", torch.tensor(unknown, device=device))
        self.register_buffer("hidden", torch.tensor(hidden, device=device))
        self.register_buffer("is_mean", torch.tensor(is_mean, device=device))
        self.register_buffer("scale", None)
        self.register_buffer("offset", None)

    def quantize(self) -> None:
        weight = self.get_buffer("weight")
        least, most = weight.aminmax(dim=1)
        scale = ((most - least) / 255).clamp(min=torch.finfo(weight.dtype).tiny)
        self.weight = ((weight - least.unsqueeze(1)) / scale.unsqueeze(1)).round_().to(torch.uint8)
        self.scale, self.offset = scale, least

    def forward(self, ids: Tensor, lengths: Tensor, num_rows: int) -> Tensor:
        """Ids [T] and lengths [F * B] of B rows -> [F, B, width]."""
        num_features = self.get_buffer("start").numel()
        lengths = lengths.view(num_features, num_rows).long()
        feature = torch.repeat_interleave(
            torch.arange(num_features, device=ids.device), lengths.sum(1), output_size=ids.shape[0]
        )
        names = ("start", "sizes", "unknown", "hidden")
        start, sizes, unknown, hidden = (self.get_buffer(name)[feature] for name in names)
        ids = ids.long()
        rows = start + torch.where((ids >= 0) & (ids < sizes) & (ids != hidden), ids, unknown)
        ends = lengths.flatten().cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        weight = self.get_buffer("weight")
        if self.scale is not None:
            weight = weight[rows] * self.scale[rows].unsqueeze(1) + self.offset[rows].unsqueeze(1)
            rows = torch.arange(ids.shape[0], device=ids.device)
        pooled = F.embedding_bag(rows, weight, offsets, mode="sum", include_last_offset=True)
        pooled = pooled.view(num_features, num_rows, pooled.shape[1])
        if self.pools_mean:
            share = torch.where(self.get_buffer("is_mean").unsqueeze(1), lengths.clamp(min=1), 1)
            pooled = pooled / share.unsqueeze(2)
        return pooled
