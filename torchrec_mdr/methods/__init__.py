"""Methods: one file per paper."""

from torchrec_mdr.baselines.finetune import Finetune
from torchrec_mdr.baselines.hamur import Hamur
from torchrec_mdr.baselines.mix import Mix
from torchrec_mdr.baselines.mmoe import MMoE
from torchrec_mdr.baselines.plate import Plate
from torchrec_mdr.baselines.ple import PLE
from torchrec_mdr.baselines.shared_bottom import SharedBottom
from torchrec_mdr.baselines.single import Single
from torchrec_mdr.baselines.star import Star
from torchrec_mdr.methods.base import Method
from torchrec_mdr.methods.mlora import MLoRA
from torchrec_mdr.methods.moe_mlora import MoEMLoRA
from torchrec_mdr.methods.multilora import MultiLoRA, SingleLoRA

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
