"""Shows a stage its training rows as if the frozen embeddings had not been learned from them.

Embeddings of ids memorise the rows they were trained on, so that what is fitted behind them on the same rows learns to
trust them too much (algorithms.md, section 8). Leaving row i out of an embedding's training would move it, to first
order, along the gradient of the row's own loss, by a step that shrinks with the number of rows that share the id:

    e_u without row i  ~  e_u + strength * g_i / n_u,    g_i = d (loss_i + l2 * |e_u|^2) / d e_u

which is one Newton step with a curvature of n_u / strength (a jackknife; Cook and Weisberg 1982 do it for regression).
The row's share of the penalty l2 goes with its loss: the two cancel on average, or all embeddings would shrink.
The one free number is set such that the backbone's log loss on training rows seen so equals that on validation rows;
where the backbone has not seen the rows, it comes out as zero and nothing is moved.

Backbone and embeddings are frozen, so what a row sees is the same in every epoch: where it fits in memory it is
computed once and kept, and a step then looks nothing up. Otherwise every step runs the backbone once more, forward and
backward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.model import MultiDomainModel

KEPT_BYTES = 2 << 30  # memory of a rank for embeddings that are kept
# from one that moves nothing to one that turns every prediction round; a table's scale decides where between
STRENGTHS = (0.0, *(2.0 ** (power / 2) for power in range(-20, 15)))


class Lookup:
    """One sparse arch, whose output can be watched, or given in place of a lookup.

    Args:
        arch (nn.Module): not sharded yet, returns embeddings [B, F, D] for a KeyedJaggedTensor; gets a new forward.
    """

    def __init__(self, arch: nn.Module) -> None:
        tables = next(m for m in arch.children() if isinstance(m, EmbeddingBagCollection)).embedding_bag_configs()
        self.pooling = {name: table.pooling for table in tables for name in table.feature_names}
        self.counts = {name: torch.zeros(table.num_embeddings) for table in tables for name in table.feature_names}
        self.width = max(table.embedding_dim for table in tables)
        self.kept: Tensor | None = None
        self.watching = False
        self.given: Tensor | None = None
        self.leaf: Tensor | None = None
        self._lookup = arch.forward
        arch.forward = self._forward

    def _forward(self, *args: object, **kwargs: object) -> Tensor:
        if self.given is not None:
            return self.given
        output: Tensor = self._lookup(*args, **kwargs)
        if not self.watching or not isinstance(output, Tensor):  # a proxy, while the pipeline traces
            return output
        self.leaf = output.detach().requires_grad_()
        return self.leaf

    def count(self, features: KeyedJaggedTensor) -> None:
        """Adds a batch's ids to the counts."""
        for name, counts in self.counts.items():
            ids = features[name].values().long()
            counts.index_add_(0, ids, torch.ones(ids.numel(), device=counts.device))

    def steps(self, features: KeyedJaggedTensor) -> Tensor:
        """The factor of a row's gradient for each feature, [B, F]: 1 / count of its id, by the rules of pooling."""
        return torch.stack([self._steps(name, features[name]) for name in self.counts], dim=1)

    def _steps(self, name: str, ids: JaggedTensor) -> Tensor:
        inverse = 1.0 / self.counts[name].clamp(min=1.0)
        # what an id's embedding moves by reaches the pooled one through the same weight that its gradient came by
        pooled = F.embedding_bag(ids.values().long(), inverse[:, None], ids.offsets()[:-1].long(), mode="sum")[:, 0]
        if self.pooling[name] is PoolingType.MEAN:
            pooled = pooled / ids.lengths().clamp(min=1).square()
        return pooled


class LeftOut(nn.Module):
    """Runs a model a second time, on embeddings without the rows' own share.

    Holds no tensor and no child, so that the train pipeline's tracer takes it as a leaf.

    Args:
        model (MultiDomainModel): its embeddings are frozen; before sharding.
        archs (Iterable[nn.Module]): the model's sparse archs.
        embedding_l2 (float): the penalty that the embeddings were trained with.
    """

    def __init__(self, model: MultiDomainModel, archs: Iterable[nn.Module], embedding_l2: float = 0.0) -> None:
        super().__init__()
        self._embedding_l2 = embedding_l2
        self._model = (model,)  # in a tuple: no child
        self._lookups = [Lookup(arch) for arch in archs]
        self._dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        self._route = model.router.route
        self._modes: list[bool] = []
        self._losses: Tensor | None = None
        self._keeping = False
        self.strength = 0.0

    @property
    def preparing(self) -> bool:
        """Whether passes try strengths or keep what rows see, instead of training."""
        return self._losses is not None or self._keeping

    @property
    def kept(self) -> bool:
        """Whether what rows see is there, and needs no second pass."""
        return not self._keeping and self._lookups[0].kept is not None

    def count(self, batches: Iterable[DomainBatch], device: torch.device) -> None:
        """Counts in how many training rows each id occurs, over all ranks.

        Raises:
            ValueError: a table whose ids are not in the data.
        """
        for lookup in self._lookups:
            lookup.counts = {name: torch.zeros_like(counts) for name, counts in lookup.counts.items()}
        for batch in batches:
            keys = set(batch.sparse_features.keys())
            if not all(lookup.counts.keys() <= keys for lookup in self._lookups):
                raise ValueError(
                    "rows cannot be left out of a method's own tables, whose ids are not in the data; set rows to all"
                )
            for lookup in self._lookups:
                lookup.count(batch.sparse_features)
        for lookup in self._lookups:
            lookup.counts = {name: counts.to(device) for name, counts in lookup.counts.items()}
            for counts in lookup.counts.values():
                if dist.is_initialized() and dist.get_world_size() > 1:
                    dist.all_reduce(counts)

    def start_calibration(self, device: torch.device) -> None:
        """From here on, passes add up the loss under each strength."""
        self._losses = torch.zeros(len(STRENGTHS) + 1, dtype=torch.float64, device=device)

    def finish_calibration(self, target: float) -> None:
        """Sets the strength under which the loss seen is the target's.

        Args:
            target (float): the backbone's log loss on rows it has not learned from.
        """
        assert self._losses is not None
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._losses)
        losses = (self._losses[:-1] / self._losses[-1]).tolist()
        self.strength = strength_for(target, losses)
        self._losses = None

    def start_keeping(self, num_places: int | None, device: torch.device) -> bool:
        """From here on, passes keep what rows see.

        Args:
            num_places (int | None): rows of this rank; None where they do not stay in memory themselves.
            device (torch.device): where embeddings are kept.

        Returns:
            bool: whether they fit, on all ranks.
        """
        widths = [len(lookup.counts) * lookup.width for lookup in self._lookups]
        fits = torch.tensor(int(num_places is not None and 4 * num_places * sum(widths) <= KEPT_BYTES), device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(fits, dist.ReduceOp.MIN)  # a lookup is a collective: all ranks make it, or none
        self._keeping = bool(fits)
        if self._keeping:
            for lookup in self._lookups:
                lookup.kept = torch.zeros(num_places or 0, len(lookup.counts), lookup.width, device=device)
        return self._keeping

    def finish_keeping(self) -> None:
        """From here on, training passes use what was kept."""
        self._keeping = False

    def give(self, batch: DomainBatch) -> None:
        """Makes the pass to come see what was kept, in place of a lookup."""
        for lookup in self._lookups:
            assert lookup.kept is not None and batch.places is not None
            lookup.given = lookup.kept.index_select(0, batch.places)

    def take_back(self) -> None:
        """Ends :meth:`give`."""
        for lookup in self._lookups:
            lookup.given = None

    def start(self) -> None:
        """Makes the pass to come the backbone's own, without dropout, and watches its embeddings."""
        (model,) = self._model
        if not self._lookups[0].watching:
            self._route = model.router.route
            self._modes = [dropout.training for dropout in self._dropouts]
        model.router.route = Route.BASE
        for dropout in self._dropouts:
            dropout.eval()
        for lookup in self._lookups:
            lookup.watching = True

    def forward(self, logits: Tensor, batch: DomainBatch) -> Tensor:
        """The backbone's logits of a batch -> the model's logits on its route, without the rows' own share."""
        (model,) = self._model
        leaves = [lookup.leaf for lookup in self._lookups if lookup.leaf is not None]
        loss = F.binary_cross_entropy_with_logits(logits.reshape(-1).float(), batch.labels, reduction="sum")
        grads = torch.autograd.grad(loss, leaves)
        moves = [
            (grad + 2.0 * self._embedding_l2 * leaf.detach()) * lookup.steps(batch.sparse_features).unsqueeze(2)
            for grad, leaf, lookup in zip(grads, leaves, self._lookups, strict=True)
        ]
        for lookup in self._lookups:
            lookup.watching = False
        try:
            if self._losses is not None:
                with torch.no_grad():
                    for i, strength in enumerate(STRENGTHS):
                        tried = self._pass(batch, leaves, moves, strength).reshape(-1).float()
                        self._losses[i] += F.binary_cross_entropy_with_logits(tried, batch.labels, reduction="sum")
                    self._losses[-1] += batch.labels.numel()
            if self._keeping:
                for lookup, leaf, move in zip(self._lookups, leaves, moves, strict=True):
                    assert lookup.kept is not None and batch.places is not None
                    seen = torch.add(leaf.detach(), move, alpha=self.strength)
                    lookup.kept.index_copy_(0, batch.places, seen)
            model.router.route = self._route
            for dropout, mode in zip(self._dropouts, self._modes, strict=True):
                dropout.train(mode)
            if self.preparing:
                return logits.detach()
            return self._pass(batch, leaves, moves, self.strength)
        finally:
            for lookup in self._lookups:
                lookup.given, lookup.leaf = None, None

    def _pass(self, batch: DomainBatch, leaves: list[Tensor], moves: list[Tensor], strength: float) -> Tensor:
        (model,) = self._model
        for lookup, leaf, move in zip(self._lookups, leaves, moves, strict=True):
            lookup.given = torch.add(leaf.detach(), move, alpha=strength)
        logits: Tensor = model(batch.dense_features, batch.sparse_features, batch.domains)
        return logits


def strength_for(target: float, losses: list[float]) -> float:
    """The first strength under which the loss reaches the target, between those tried by a straight line.

    Args:
        target (float): the loss to reach.
        losses (list[float]): under each of `STRENGTHS`.

    Example::

        >>> strength_for(0.5, [0.6] * len(STRENGTHS))
        0.0
        >>> strength_for(0.5, [0.4] + [0.6] * (len(STRENGTHS) - 1)) == STRENGTHS[1] / 2
        True
    """
    if losses[0] >= target:
        return 0.0
    for i in range(1, len(losses)):
        if losses[i] >= target:
            share = (target - losses[i - 1]) / (losses[i] - losses[i - 1])
            return STRENGTHS[i - 1] + share * (STRENGTHS[i] - STRENGTHS[i - 1])
    return STRENGTHS[-1]
