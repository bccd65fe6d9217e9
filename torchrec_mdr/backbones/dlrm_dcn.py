"""TorchRec's DLRM_DCN, as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchrec.models.dlrm import DLRM_DCN

from torchrec_mdr.backbones.config import check_positive
from torchrec_mdr.backbones.dlrm import DLRM_ADAPTER_TARGETS, DLRMConfig, without_empty_warning
from torchrec_mdr.data.schema import Schema

# the cross net is one module without nn.Linear, so it gets an adapter of its own kind
DLRM_DCN_ADAPTER_TARGETS = ("inter_arch.crossnet", *DLRM_ADAPTER_TARGETS)


@dataclass(frozen=True)
class DLRMDCNConfig(DLRMConfig):
    """Options of `dlrm_dcn`: DLRM with DCN v2's low-rank cross net as its interaction (Wang et al. 2021).

    Args:
        hidden (tuple[int, ...]): widths of the over arch's hidden layers.
        dense_hidden (tuple[int, ...]): widths of the dense arch before its last layer, as wide as an embedding.
        dcn_num_layers (int): cross layers.
        dcn_low_rank_dim (int): rank of each cross matrix.

    Raises:
        ValueError: a width, count or rank below 1, or no hidden layer.
    """

    dcn_num_layers: int = 2
    dcn_low_rank_dim: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("dcn_num_layers", self.dcn_num_layers)
        check_positive("dcn_low_rank_dim", self.dcn_low_rank_dim)

    def build(self, schema: Schema, embedding_dim: int) -> nn.Module:
        """See `BackboneConfig.build`."""
        return without_empty_warning(
            DLRM_DCN,
            **self.dlrm_arguments(schema, embedding_dim),
            dcn_num_layers=self.dcn_num_layers,
            dcn_low_rank_dim=self.dcn_low_rank_dim,
        )
