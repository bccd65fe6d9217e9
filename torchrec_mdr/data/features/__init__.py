"""From raw rows to ids and numbers: what was decided at preparation, kept and applied again at prediction."""

from torchrec_mdr.data.feature_files import FEATURE_FILES, copy_features, has_features
from torchrec_mdr.data.features.encode import EncodedRows
from torchrec_mdr.data.features.plan import (
    DensePlan,
    DivisionPlan,
    FeaturePlan,
    LabelPlan,
    SparsePlan,
)
from torchrec_mdr.data.features.vocabulary import Vocabularies

__all__ = [
    "FEATURE_FILES",
    "DensePlan",
    "DivisionPlan",
    "EncodedRows",
    "FeaturePlan",
    "LabelPlan",
    "SparsePlan",
    "Vocabularies",
    "copy_features",
    "has_features",
]
