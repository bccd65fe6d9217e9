"""Models of torch-rechub, which is optional: `pip install torch-rechub`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from benchmarks.plain import PlainBatch
from torchrec_mdr.data.schema import Schema


class RechubModel(nn.Module):
    """A torch-rechub model, asked for each row's own domain.

    Args:
        model (nn.Module): gives probabilities, [B] or one column a domain.
        schema (Schema): names of the features.
    """

    def __init__(self, model: nn.Module, schema: Schema) -> None:
        super().__init__()
        self.model = model
        self.sparse = [feature.name for feature in schema.sparse_features]
        self.dense = list(schema.dense_features)

    def forward(self, batch: PlainBatch) -> Tensor:
        """Probabilities [B]."""
        columns = dict(zip(self.sparse, batch.ids.unbind(1), strict=True))
        columns |= dict(zip(self.dense, batch.dense.unbind(1), strict=True))
        probabilities: Tensor = self.model(columns)
        if probabilities.dim() == 2:
            probabilities = probabilities.gather(1, batch.domains.unsqueeze(1)).squeeze(1)
        return probabilities


def rechub_models(schema: Schema, dim: int, num_domains: int, hidden: Sequence[int]) -> dict[str, RechubModel]:
    """The models of these sizes, by name. To the multi-task ones a domain is a task with a tower of its own.

    torch-rechub has no multi-domain models. The last hidden layer is the towers', the others the bottom's or the
    experts'; MMoE has as many experts as domains, PLE one of each domain and one for all.

    Raises:
        ImportError: torch-rechub is not installed.
    """
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, PLE, SharedBottom
    from torch_rechub.models.ranking import DeepFM

    sparse = [SparseFeature(feature.name, feature.num_embeddings, dim) for feature in schema.sparse_features]
    features = [*sparse, *(DenseFeature(name) for name in schema.dense_features)]
    tasks = ["classification"] * num_domains
    split = max(len(hidden) - 1, 1)
    bottom = {"dims": list(hidden[:split])}
    towers = [{"dims": list(hidden[split:])} for _ in tasks]
    models: dict[str, nn.Module] = {
        "deepfm": DeepFM(features, sparse, {"dims": list(hidden)}),
        "shared_bottom": SharedBottom(features, tasks, bottom, towers),
        "mmoe": MMOE(features, tasks, num_domains, bottom, towers),
        "ple": PLE(features, tasks, 1, 1, 1, bottom, towers),
    }
    return {name: RechubModel(model, schema) for name, model in models.items()}
