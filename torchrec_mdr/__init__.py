"""One CTR model for many domains: low-rank adapters on TorchRec."""

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed.backbone_state import backbone_state
from torchrec_mdr.distributed.pipeline import MultiDomainTrain
from torchrec_mdr.methods import Method, MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA, Stage
from torchrec_mdr.metrics import DomainMetrics
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.new_domains import load_with_new_domains
from torchrec_mdr.training.prepared_stage import PreparedStage, prepare_stage

__version__ = "0.1.0"

__all__ = [
    "Division",
    "DomainMetrics",
    "MLoRA",
    "Method",
    "MoEMLoRA",
    "MultiDomainModel",
    "MultiDomainTrain",
    "MultiLoRA",
    "PreparedStage",
    "Route",
    "SingleLoRA",
    "Stage",
    "backbone_state",
    "load_with_new_domains",
    "prepare_stage",
]
