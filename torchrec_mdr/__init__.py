"""One CTR model for many domains: low-rank adapters on TorchRec."""

from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods import MLoRA, MoEMLoRA, MultiLoRA, SingleLoRA
from torchrec_mdr.model import MultiDomainModel

__all__ = ["Division", "MLoRA", "MoEMLoRA", "MultiDomainModel", "MultiLoRA", "SingleLoRA"]
