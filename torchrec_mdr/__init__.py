"""One CTR model for many domains: low-rank adapters on TorchRec."""

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA, Stage
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.model import MultiDomainModel

__version__ = "0.1.0"

__all__ = [
    "Division",
    "DomainMetrics",
    "MLoRA",
    "MoEMLoRA",
    "MultiDomainModel",
    "MultiLoRA",
    "Route",
    "SingleLoRA",
    "Stage",
]
