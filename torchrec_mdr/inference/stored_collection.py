"""Tables of adapters that stay in a checkpoint: a pass reads the rows of its domains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.stored_rows import StoredTensor
from torchrec_mdr.model import MultiDomainModel


class StoredCollection(nn.Module):
    """What stands in an :class:`EmbeddingCollection`'s place, for evaluation: it looks rows up in a checkpoint.

    Args:
        collection (EmbeddingCollection): its tables may lie on the meta device.
        tensors (Mapping[str, StoredTensor]): by table.
    """

    def __init__(self, collection: EmbeddingCollection, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__()
        configs = collection.embedding_configs()
        self.places = [
            (feature, name, tensors[config.name])
            for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True)
            for feature, name in zip(config.feature_names, names, strict=True)
        ]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Ids by feature -> rows in float32 by the names that TorchRec gives what it looks up."""
        found = {}
        for feature, name, tensor in self.places:
            ids = features[feature]
            rows = tensor.at(ids.values().cpu()).to(ids.values().device, torch.float32)
            found[name] = JaggedTensor(rows, lengths=ids.lengths())
        return found


def read_on_demand(model: MultiDomainModel, folder: str) -> None:
    """Has a model with sharded banks, on the meta device, read their rows from a checkpoint that has them as tables.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    tables = model.bank_tables
    assert tables is not None, "the model was built with sharded banks"
    stored = {name.split(".")[-2]: name for name in checkpoint.stored_sizes(folder) if name.startswith("bank_tables.")}
    for width, collection in list(tables.collections.items()):
        assert isinstance(collection, EmbeddingCollection)
        tensors = {}
        for config in collection.embedding_configs():
            size = config.num_embeddings, config.embedding_dim
            if config.name not in stored:
                raise ValueError(f"checkpoint {folder} is of another model: it has no table '{config.name}'")
            tensors[config.name] = StoredTensor(folder, stored[config.name])
            if tuple(tensors[config.name].size) != size:
                raise ValueError(
                    f"checkpoint {folder} is of another model: '{stored[config.name]}' is "
                    f"{list(tensors[config.name].size)} there, and {list(size)} here"
                )
        tables.collections[width] = StoredCollection(collection, tensors)
