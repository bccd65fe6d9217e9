"""The embedding tables of a backbone."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mdr.data.schema import Schema


def build_tables(schema: Schema, embedding_dim: int, linear: bool = False) -> EmbeddingBagCollection:
    """Describes one table a sparse feature, on the meta device: TorchRec allocates them when it shards.

    Lists are pooled as the schema says, and single ids summed: with one id a row mean and sum are the same, and the
    sum shards without a division by lengths.

    Args:
        schema (Schema): sparse features with their vocabulary sizes.
        embedding_dim (int): width of the embeddings, a multiple of 4 as fbgemm's kernels want it.
        linear (bool): tables of first-order weights, which start at zero and not at random.

    Returns:
        EmbeddingBagCollection: tables `t_NAME`, or `linear_NAME`, in the schema's order; see :func:`table_name`.

    Raises:
        ValueError: no sparse feature, or a width that is not a positive multiple of 4.

    Example::

        >>> from torchrec_mdr.data.schema import SparseFeature
        >>> schema = Schema("d", "label", (SparseFeature("user", 10),), (), (), {})
        >>> [(t.name, t.embedding_dim) for t in build_tables(schema, 8).embedding_bag_configs()]
        [('t_user', 8)]
    """
    if not schema.sparse_features:
        raise ValueError(f"data set '{schema.dataset}' has no sparse feature, and a backbone needs at least one")
    if embedding_dim < 1 or embedding_dim % 4:
        raise ValueError(f"embedding_dim must be a positive multiple of 4, not {embedding_dim}")
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table_name(feature.name, linear),
                embedding_dim=embedding_dim,
                num_embeddings=feature.num_embeddings,
                feature_names=[feature.name],
                pooling=PoolingType.MEAN if feature.multi_hot and feature.pooling == "mean" else PoolingType.SUM,
                init_fn=nn.init.zeros_ if linear else None,
            )
            for feature in schema.sparse_features
        ],
        device=torch.device("meta"),
    )


def table_name(feature: str, linear: bool = False) -> str:
    """Name of a feature's table, which is a part of names of modules, tensors and files.

    Characters that separate such parts are percent-encoded, and so is the percent sign, so that no two features meet.

    Example::

        >>> table_name("user"), table_name("user.id"), table_name("user/id", linear=True), table_name("user%2Eid")
        ('t_user', 't_user%2Eid', 'linear_user%2Fid', 't_user%252Eid')
    """
    escaped = feature.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")
    return f"{'linear' if linear else 't'}_{escaped}"


def materialize_tables(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Allocates and initialises the tables of a model that will not be sharded, in place.

    Args:
        model (nn.Module): holds `EmbeddingBagCollection`s on the meta device.
        device (torch.device | str): where the tables go.

    Returns:
        nn.Module: the same model.
    """
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                bag = module.embedding_bags[config.name]
                if bag.weight.is_meta:
                    assert config.init_fn is not None
                    config.init_fn(bag.to_empty(device=device).weight)
    return model
