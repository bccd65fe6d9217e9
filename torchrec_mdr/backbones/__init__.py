"""Backbones: the models that adapters wrap, one file each, all on the same embedding tables."""

from __future__ import annotations

from torch import nn
from torchrec.models.dlrm import DLRM, DLRM_DCN

from torchrec_mdr.backbones.autoint import AutoIntConfig
from torchrec_mdr.backbones.config import BackboneConfig
from torchrec_mdr.backbones.dcn import DCNConfig
from torchrec_mdr.backbones.deepfm import DeepFMConfig
from torchrec_mdr.backbones.dlrm import DLRM_ADAPTER_TARGETS, DLRMConfig
from torchrec_mdr.backbones.dlrm_dcn import DLRM_DCN_ADAPTER_TARGETS, DLRMDCNConfig
from torchrec_mdr.backbones.fibinet import FiBiNETConfig
from torchrec_mdr.backbones.mlp import MLPConfig
from torchrec_mdr.backbones.nfm import NFMConfig
from torchrec_mdr.backbones.pnn import PNNConfig
from torchrec_mdr.backbones.tables import build_tables, materialize_tables
from torchrec_mdr.backbones.wdl import WDLConfig
from torchrec_mdr.backbones.xdeepfm import XDeepFMConfig

BACKBONES: dict[str, type[BackboneConfig]] = {
    "mlp": MLPConfig,
    "dlrm": DLRMConfig,
    "dlrm_dcn": DLRMDCNConfig,
    "wdl": WDLConfig,
    "deepfm": DeepFMConfig,
    "nfm": NFMConfig,
    "autoint": AutoIntConfig,
    "pnn": PNNConfig,
    "dcn": DCNConfig,
    "fibinet": FiBiNETConfig,
    "xdeepfm": XDeepFMConfig,
}

__all__ = ["BACKBONES", "BackboneConfig", "adapter_targets", "build_tables", "materialize_tables"]


def adapter_targets(backbone: nn.Module) -> tuple[str, ...]:
    """Says which layers of a backbone adapters may wrap.

    Args:
        backbone (nn.Module): one of this package, TorchRec's DLRM or DLRM_DCN, or any model with an attribute
            `adapter_targets`.

    Returns:
        tuple[str, ...]: fnmatch patterns over the names in `backbone.named_modules()`.

    Raises:
        ValueError: the model does not say.

    Example::

        >>> adapter_targets(nn.Linear(2, 1))
        Traceback (most recent call last):
        ...
        ValueError: Linear does not say which layers adapters may wrap; name them in the option target_modules
    """
    targets = getattr(backbone, "adapter_targets", None)
    if isinstance(targets, tuple):
        return targets
    if isinstance(backbone, DLRM_DCN):
        return DLRM_DCN_ADAPTER_TARGETS
    if isinstance(backbone, DLRM):
        return DLRM_ADAPTER_TARGETS
    raise ValueError(
        f"{type(backbone).__name__} does not say which layers adapters may wrap; name them in the option target_modules"
    )
