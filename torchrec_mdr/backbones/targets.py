"""Which layers of a backbone adapters may wrap."""

from __future__ import annotations

from torch import nn
from torchrec.models.dlrm import DLRM, DLRM_DCN

from torchrec_mdr.backbones.dlrm import DLRM_ADAPTER_TARGETS
from torchrec_mdr.backbones.dlrm_dcn import DLRM_DCN_ADAPTER_TARGETS


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
