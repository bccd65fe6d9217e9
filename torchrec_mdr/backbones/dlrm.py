"""TorchRec's DLRM, as it is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.models.dlrm import DLRM

from torchrec_mdr.backbones.config import BackboneConfig, check_layer_sizes
from torchrec_mdr.backbones.tables import build_tables
from torchrec_mdr.data.schema import Schema

# TorchRec's over arch is Sequential(MLP, scoring layer): the hidden layers of the MLP
DLRM_ADAPTER_TARGETS = ("over_arch.model.0._mlp.*._linear",)


@dataclass(frozen=True)
class DLRMConfig(BackboneConfig):
    """Options of `dlrm`: dense arch, pairwise dot products, over arch (Naumov et al. 2019).

    Without dense features the dense arch gives the same learned vector to every row.

    Args:
        hidden (tuple[int, ...]): widths of the over arch's hidden layers.
        dense_hidden (tuple[int, ...]): widths of the dense arch before its last layer, as wide as an embedding.

    Raises:
        ValueError: a width below 1, or no hidden layer.
    """

    dense_hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_hidden:
            check_layer_sizes("dense_hidden", self.dense_hidden)

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return without_empty_warning(DLRM, **self.dlrm_arguments(schema, embedding_dim))

    def dlrm_arguments(self, schema: Schema, embedding_dim: int) -> dict[str, Any]:
        """The arguments that DLRM and its relatives share."""
        return {
            "embedding_bag_collection": build_tables(schema, embedding_dim),
            "dense_in_features": len(schema.dense_features),
            "dense_arch_layer_sizes": [*self.dense_hidden, embedding_dim],
            "over_arch_layer_sizes": [*self.hidden, 1],
        }


def without_empty_warning(model: type[DLRM], **arguments: Any) -> DLRM:
    """Builds a DLRM; one without dense features has an empty weight, of which PyTorch would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
        return model(**arguments)
