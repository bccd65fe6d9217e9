"""What the train pipeline runs: the model with its loss, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.distributed.execution import Precision, autocast
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.groups import BatchDomains


class StepOutput(NamedTuple):
    """What one step leaves behind, all without gradients.

    Args:
        loss (Tensor): [], this rank's share of the mean loss over the global batch, times the number of ranks.
        logits (Tensor): [B].
        labels (Tensor): [B].
        domain_ids (Tensor): int64 [B, V].
        weights (Tensor | None): float32 [B], see :class:`DomainBatch`.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    domain_ids: Tensor
    weights: Tensor | None = None


class LossArch(nn.Module):
    """Binary cross entropy over the rows of the global batch, by the rows' weights and a constant of their domain.

    Scaled so that the mean of the ranks' gradients, which DistributedDataParallel takes, is the gradient of the mean
    over all rows, however unequal the ranks' shares are.

    Args:
        division (int): the division whose domains are weighed.
        domain_weights (Tensor | None): float32 [N]; every row weighs 1 where left out.
    """

    def __init__(self, division: int = 0, domain_weights: Tensor | None = None) -> None:
        super().__init__()
        self.division = division
        self.domain_weights = domain_weights
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def forward(self, logits: Tensor, batch: DomainBatch) -> tuple[Tensor, StepOutput]:
        """Logits [B, 1] or [B] -> the loss to differentiate, and what is kept of the step."""
        logits = logits.reshape(-1).float()
        losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        if self.domain_weights is not None:
            losses = losses * self.domain_weights.index_select(0, batch.domains.ids[:, self.division])
        if batch.weights is not None:
            losses = losses * batch.weights
        loss = losses.sum() * (self.world_size / batch.global_rows)
        return loss, StepOutput(loss.detach(), logits.detach(), batch.labels, batch.domains.ids, batch.weights)


class _EmbeddingL2(torch.autograd.Function):
    """Identity whose gradient is that of the penalty added to the loss."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(embeddings)
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (embeddings,) = ctx.saved_tensors
        return grads[0] + (2.0 * ctx.weight) * embeddings, None


class PassHook(nn.Module):
    """What happens before and after the model's forward pass. Holds no tensor: a leaf for the pipeline's tracer."""

    def before(self, batch: DomainBatch) -> None:
        """Takes note of the batch whose pass comes next."""

    def forward(self, logits: Tensor, batch: DomainBatch) -> Tensor:
        """The model's logits of the batch -> the logits that the loss is of."""
        return logits


class EmbeddingPenalty(PassHook):
    """Adds ``weight * sum of squares / B`` of the embeddings looked up to the gradients, B rows of the global batch.

    The loss that is reported stays the cross entropy. Works for any module that returns the looked-up embeddings, so
    also for TorchRec's own DLRM.

    Args:
        weight (float): of the penalty.
        sparse_archs (Iterable[nn.Module]): what looks embeddings up.
    """

    def __init__(self, weight: float, sparse_archs: Iterable[nn.Module]) -> None:
        super().__init__()
        self.weight = weight
        self.scale = 0.0  # of the step under way
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        for arch in sparse_archs:
            arch.register_forward_hook(self._penalise)

    def before(self, batch: DomainBatch) -> None:
        """See :class:`PassHook`."""
        self.scale = self.weight * self.world_size / batch.global_rows

    def _penalise(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):  # a proxy, while the pipeline traces
            return output
        penalised: Tensor = _EmbeddingL2.apply(output, self.scale)
        return penalised


Reader = str | Callable[[Any], Any]  # of a part of a batch: the attribute's name, or what gives it


class BatchPart(nn.Module):
    """Reads a part of a batch. A module of its own: a leaf for the train pipeline's tracer, so it may do anything.

    Args:
        reader (str | Callable): the attribute's name, or reader(batch).
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = attrgetter(reader) if isinstance(reader, str) else reader

    def forward(self, batch: Any) -> Any:
        """The part."""
        return self.reader(batch)


class DomainLoss(nn.Module):
    """DLRMTrain's loss, binary cross entropy, each row weighed by a constant of its domain.

    Args:
        labels (BatchPart): reads [B], 0 or 1.
        domain_ids (BatchPart): reads the batch's domains.
        division (int): the division whose domains are weighed.
        domain_weights (Sequence[float] | Tensor | None): [N], one a domain; every row weighs 1 where left out, and rows
            of unknown domains always.
    """

    weights: Tensor | None

    def __init__(
        self,
        labels: BatchPart,
        domain_ids: BatchPart,
        division: int = 0,
        domain_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.labels = labels
        self.domain_ids = domain_ids
        self.division = division
        weights = None if domain_weights is None else torch.as_tensor(domain_weights, dtype=torch.float32)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Logits [B, 1] or [B] -> the loss to differentiate, and (loss, logits, labels) without gradients."""
        logits, labels = logits.squeeze(-1), self.labels(batch)
        weights = None
        if self.weights is not None:
            ids = self.domain_ids(batch)
            ids = ids.ids if isinstance(ids, BatchDomains) else ids
            ids = ids if ids.dim() == 1 else ids[:, self.division]
            weights = torch.where(ids >= 0, self.weights.index_select(0, ids.clamp(min=0)), 1.0)
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), weights)
        return loss, (loss.detach(), logits.detach(), labels.detach())


class MultiDomainTrain(nn.Module):
    """A MultiDomainModel with its loss: what DLRMTrain is to DLRM, for a batch of any class.

    Args:
        model (MultiDomainModel): the model.
        domain_ids (str | Callable): the batch's domains, int64 [B, V] ([B] where there is one division): an attribute's
            name, or ``domain_ids(batch)``. Ids may come as a field or from a sparse feature.
        dense_features (str | Callable): [B, num_dense_features], likewise.
        sparse_features (str): the attribute with the KeyedJaggedTensor. A name, since the train pipeline follows it.
        labels (str | Callable): [B], 0 or 1.
        domain_weights (Sequence[float] | Tensor | None): [N], what a row of each domain weighs in the loss.
        division (int): the division whose domains are weighed.
        loss (nn.Module | None): ``loss(logits, batch)`` in place of binary cross entropy.
        hooks (Sequence[PassHook]): what happens around each pass, in this order.
        precision (Precision): of training; evaluation is in float32, since logits in bfloat16 tie.
        device (torch.device | None): where the model will be; the CPU where left out.

    Forward gives ``(loss, (loss, logits, labels))`` as DLRMTrain does, what is in the inner tuple without gradients; or
    what a ``loss`` of one's own gives.

    Example::

        >>> from torchrec.datasets.utils import Batch
        >>> from torchrec.models.dlrm import DLRM
        >>> from torchrec.modules.embedding_configs import EmbeddingBagConfig
        >>> from torchrec.modules.embedding_modules import EmbeddingBagCollection
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> from torchrec_mdr import Division, MLoRA
        >>> table = EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=9, feature_names=["scenario"])
        >>> dlrm = DLRM(EmbeddingBagCollection(tables=[table]), 4, [16, 8], [32, 16, 1])
        >>> model = MultiDomainModel(dlrm, MLoRA(rank=8), [Division("scenario", 9)])
        >>> train_model = MultiDomainTrain(model, lambda batch: batch.sparse_features["scenario"].values())
        >>> ids = KeyedJaggedTensor.from_lengths_sync(["scenario"], torch.tensor([7, 3]), torch.tensor([1, 1]))
        >>> loss, (_, logits, labels) = train_model(Batch(torch.rand(2, 4), ids, torch.tensor([0, 1])))
        >>> loss.requires_grad, logits.shape, labels.tolist()
        (True, torch.Size([2]), [0, 1])
    """

    def __init__(
        self,
        model: MultiDomainModel,
        domain_ids: Reader,
        *,
        dense_features: Reader = "dense_features",
        sparse_features: str = "sparse_features",
        labels: Reader = "labels",
        domain_weights: Sequence[float] | Tensor | None = None,
        division: int = 0,
        loss: nn.Module | None = None,
        hooks: Sequence[PassHook] = (),
        precision: Precision = "fp32",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.domain_ids, self.dense_features = BatchPart(domain_ids), BatchPart(dense_features)
        self.sparse_features = attrgetter(sparse_features)  # no module: the tracer has to see where they come from
        if loss is None:
            loss = DomainLoss(BatchPart(labels), self.domain_ids, division, domain_weights)
        self.loss = loss
        self.hooks = nn.ModuleList(hooks)
        self.precision = precision
        self.device = device or torch.device("cpu")

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        """A batch -> the loss to differentiate, and what is kept of the step."""
        for hook in self.hooks:
            hook.before(batch)  # type: ignore[operator]
        with autocast(self.precision if self.training else "fp32", self.device):
            logits = self.model(self.dense_features(batch), self.sparse_features(batch), self.domain_ids(batch))
        for hook in self.hooks:
            logits = hook(logits, batch)
        output: tuple[Tensor, Any] = self.loss(logits, batch)
        return output


def progress_all(pipeline: Any, batches: Iterator[DomainBatch]) -> Iterator[StepOutput]:
    """Runs a train pipeline over all batches of an iterator.

    Yields:
        StepOutput: one a batch, in order.
    """
    while True:
        try:
            output = pipeline.progress(batches)
        except StopIteration:
            return
        yield output
