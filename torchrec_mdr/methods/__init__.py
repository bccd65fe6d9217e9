"""The papers' methods: one file per paper."""

from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.mlora import MLoRA
from torchrec_mdr.methods.moe_mlora import MoEMLoRA
from torchrec_mdr.methods.multilora import MultiLoRA, SingleLoRA
from torchrec_mdr.methods.stage import Stage

__all__ = ["MLoRA", "Method", "MoEMLoRA", "MultiLoRA", "SingleLoRA", "Stage"]
