"""Methods: one file per paper."""

from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.finetune import Finetune
from torchrec_mdr.methods.hamur import Hamur
from torchrec_mdr.methods.mix import Mix
from torchrec_mdr.methods.mlora import MLoRA
from torchrec_mdr.methods.mmoe import MMoE
from torchrec_mdr.methods.moe_mlora import MoEMLoRA
from torchrec_mdr.methods.multilora import MultiLoRA, SingleLoRA
from torchrec_mdr.methods.plate import Plate
from torchrec_mdr.methods.ple import PLE
from torchrec_mdr.methods.shared_bottom import SharedBottom
from torchrec_mdr.methods.single import Single
from torchrec_mdr.methods.star import Star

METHODS: dict[str, type[Method]] = {
    "mlora": MLoRA,
    "multilora": MultiLoRA,
    "single_lora": SingleLoRA,
    "moe_mlora": MoEMLoRA,
    "single": Single,
    "mix": Mix,
    "finetune": Finetune,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "star": Star,
    "hamur": Hamur,
    "plate": Plate,
}

__all__ = [
    "METHODS",
    "PLE",
    "Finetune",
    "Hamur",
    "MLoRA",
    "MMoE",
    "Method",
    "Mix",
    "MoEMLoRA",
    "MultiLoRA",
    "Plate",
    "SharedBottom",
    "Single",
    "SingleLoRA",
    "Star",
]
