"""What a stage may do beside training, from another package, too: a hook, which its settings ask for by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed.pipeline import PassHook
from torchrec_mdr.model import MultiDomainModel

if TYPE_CHECKING:
    from torchrec_mdr.training.stage_trainer import StageTrainer


class StageHook(PassHook):
    """A hook of a stage; listed in `torchrec_mdr.registry.HOOKS`, or an entry point in `torchrec_mdr.hooks`.

    Holds no tensor that trains and no child module, so that the train pipeline's tracer takes it as a leaf.

    Args:
        model (MultiDomainModel): the stage's model, before it is sharded.
        sparse_archs (Sequence[nn.Module]): its modules that hold an embedding collection.
        pretrained_l2 (float): the penalty that frozen embeddings were trained with.
    """

    @staticmethod
    def applies(trains_embeddings: bool) -> bool:
        """Whether the hook has something to do in a stage that trains embeddings, or does not."""
        return True

    def __init__(self, model: MultiDomainModel, sparse_archs: Sequence[nn.Module], pretrained_l2: float = 0.0) -> None:
        super().__init__()

    def start(self, trainer: StageTrainer, shared: dict[Any, Any]) -> None:
        """Prepares the stage, once its tensors are loaded; called by all ranks.

        Args:
            trainer (StageTrainer): with the rows to learn from, evaluation, and the pipeline.
            shared (dict): kept from stage to stage while the backbone stays as it is.
        """

    def before(self, batch: DomainBatch) -> None:
        """See :class:`PassHook`."""

    def forward(self, logits: Tensor, batch: DomainBatch) -> Tensor:
        """See :class:`PassHook`."""
        return logits
