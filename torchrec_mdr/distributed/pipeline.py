"""What the train pipeline runs: the model with its loss, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.model import MultiDomainModel


class StepOutput(NamedTuple):
    """What one step leaves behind, all without gradients.

    Args:
        loss (Tensor): [], this rank's share of the mean loss over the global batch, times the number of ranks.
        logits (Tensor): [B].
        labels (Tensor): [B].
        domain_ids (Tensor): int64 [B, V].
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor
    domain_ids: Tensor


class LossArch(nn.Module):
    """Binary cross entropy over the rows of the global batch, each row weighed by a constant of its domain.

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
        loss = losses.sum() * (self.world_size / batch.global_rows)
        return loss, StepOutput(loss.detach(), logits.detach(), batch.labels, batch.domains.ids)


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


class TrainModule(nn.Module):
    """Batch in, loss out: the signature that TorchRec's train pipelines ask for.

    Args:
        model (MultiDomainModel): the model.
        loss (LossArch): its loss.
        hooks (Sequence[PassHook]): what happens around each pass, in this order.
    """

    def __init__(self, model: MultiDomainModel, loss: LossArch, hooks: Sequence[PassHook] = ()) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.hooks = nn.ModuleList(hooks)

    def forward(self, batch: DomainBatch) -> tuple[Tensor, StepOutput]:
        """See :class:`LossArch`."""
        for hook in self.hooks:
            hook.before(batch)  # type: ignore[operator]
        logits = self.model(batch.dense_features, batch.sparse_features, batch.domains)
        for hook in self.hooks:
            logits = hook(logits, batch)
        output: tuple[Tensor, StepOutput] = self.loss(logits, batch)
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
