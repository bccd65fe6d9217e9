"""Baselines: what the papers' methods are compared with, one file each, and the layers that only they use."""

from torchrec_mdr.baselines.finetune import Finetune
from torchrec_mdr.baselines.hamur import Hamur
from torchrec_mdr.baselines.mix import Mix
from torchrec_mdr.baselines.mmoe import MMoE
from torchrec_mdr.baselines.plate import Plate
from torchrec_mdr.baselines.ple import PLE
from torchrec_mdr.baselines.shared_bottom import SharedBottom
from torchrec_mdr.baselines.single import Single
from torchrec_mdr.baselines.star import Star

__all__ = ["PLE", "Finetune", "Hamur", "MMoE", "Mix", "Plate", "SharedBottom", "Single", "Star"]
