"""What a stage may do beside training, from another package, too: a hook, which its settings ask for by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import nn

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed.environment import Environment
from torchrec_mdr.distributed.pipeline import PassHook
from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.metrics import Metrics
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.training.experiment import Experiment


class StageUnderWay(Protocol):
    """The stage that a hook belongs to."""

    stage: Stage
    experiment: Experiment
    environment: Environment

    def evaluate(self, split: str, route: Route) -> Metrics:
        """Metrics of a split's rows on a route, on all ranks."""

    def forward_all(self, batches: Iterator[DomainBatch]) -> None:
        """Runs batches for what hooks make of them, in evaluation mode but with gradients."""

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, on the main process."""


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

    def start(self, under_way: StageUnderWay, shared: dict[Any, Any]) -> None:
        """Prepares the stage, once its tensors are loaded; called by all ranks.

        Args:
            under_way (StageUnderWay): with the rows to learn from, evaluation, and the pipeline.
            shared (dict): kept from stage to stage while the backbone stays as it is.
        """
