"""The second pass of a model, on embeddings that rows have been left out of; the package says how."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.data.batch import DomainBatch
from torchrec_mdr.experiments.leave_one_out.lookup import Lookup
from torchrec_mdr.experiments.leave_one_out.scale import SCALES, scale_for
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.ops.collectives import sum_over_ranks
from torchrec_mdr.training.hooks import StageHook

KEPT_BYTES = 2 << 30  # memory of a rank for embeddings that are kept


class Task(enum.Enum):
    """What passes prepare, in this order."""

    MEASURE = "measure"  # add up the curvature
    CALIBRATE = "calibrate"  # add up the loss under each scale
    KEEP = "keep"  # keep what rows see


class LeftOutEmbeddings(NamedTuple):
    """What a rank's rows see, for all stages behind the same backbone.

    Args:
        scale (float): rows were left out with.
        embeddings (tuple[Tensor, ...]): [num_resident_rows, F, D] of each lookup.
    """

    scale: float
    embeddings: tuple[Tensor, ...]


class SecondPass(StageHook):
    """Runs a model a second time, on embeddings without the rows' own share.

    Three tasks prepare it: measure the curvature, calibrate the scale, keep what rows see.

    Args:
        model (MultiDomainModel): its embeddings are frozen; before sharding.
        archs (Sequence[nn.Module]): the model's sparse archs.
        pretrained_l2 (float): the penalty that the embeddings were trained with.
    """

    def __init__(self, model: MultiDomainModel, archs: Sequence[nn.Module], pretrained_l2: float = 0.0) -> None:
        super().__init__(model, archs, pretrained_l2)
        self._embedding_l2 = pretrained_l2
        self._model = (model,)  # in a tuple: no child
        self._lookups = [Lookup(arch) for arch in archs]
        self._dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        self._route = model.router.route
        self._modes: list[bool] = []
        self._losses = torch.zeros(0)
        self.task: Task | None = None
        self.scale = 0.0

    def before(self, batch: DomainBatch) -> None:
        """See :class:`PassHook`: the pass sees what was kept, or is the backbone's own."""
        if self._acts and self.kept:
            self._give(batch)
        elif self._acts:
            self._watch()

    def forward(self, logits: Tensor, batch: DomainBatch) -> Tensor:
        """See :class:`PassHook`: the model's logits on its route, without the rows' own share."""
        if not self._acts:
            return logits
        if self.kept:
            for lookup in self._lookups:
                lookup.given = None
            return logits
        return self._second_pass(logits, batch)

    @property
    def _acts(self) -> bool:
        """Whether passes are changed: in training, and while there is a task."""
        return self.training or self.task is not None

    @property
    def kept(self) -> bool:
        """Whether what rows see is there, and needs no second pass."""
        return self.task is None and self._lookups[0].kept is not None

    def start_measuring(self, batch: DomainBatch, device: torch.device) -> None:
        """From here on, passes add up the curvature.

        Args:
            batch (DomainBatch): any.
            device (torch.device): where curvature is kept.

        Raises:
            ValueError: a table whose ids are not in the data.
        """
        keys = set(batch.sparse_features.keys())
        if not all(lookup.tables.keys() <= keys for lookup in self._lookups):
            raise ValueError(
                "rows cannot be left out of a method's own tables, whose ids are not in the data; leave leave_one_out "
                "out of the stage's hooks"
            )
        self.task = Task.MEASURE
        for lookup in self._lookups:
            lookup.start_measuring(device)

    def finish_measuring(self) -> None:
        """Takes the curvature of all ranks together."""
        self.task = None
        for lookup in self._lookups:
            for curvature in lookup.curvatures.values():
                curvature.finish()

    def start_calibration(self, device: torch.device) -> None:
        """From here on, passes add up the loss under each scale."""
        self.task = Task.CALIBRATE
        self._losses = torch.zeros(len(SCALES) + 1, dtype=torch.float64, device=device)

    def finish_calibration(self, target: float) -> None:
        """Sets the scale under which the loss seen is the target's.

        Args:
            target (float): the backbone's log loss on rows it has not learned from.
        """
        self.task = None
        total = sum_over_ranks(self._losses)
        losses = (total[:-1] / total[-1]).tolist()
        self.scale = scale_for(target, losses)

    def start_keeping(self, num_resident_rows: int | None, device: torch.device) -> bool:
        """From here on, passes keep what rows see.

        Args:
            num_resident_rows (int | None): rows of this rank; None where they do not stay in memory themselves.
            device (torch.device): where embeddings are kept.

        Returns:
            bool: whether they fit, on all ranks.
        """
        width = sum(len(lookup.tables) * lookup.dim for lookup in self._lookups)
        fits = torch.tensor(
            int(num_resident_rows is not None and 4 * num_resident_rows * width <= KEPT_BYTES), device=device
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(fits, dist.ReduceOp.MIN)  # a lookup is a collective: all ranks make it, or none
        if not fits:
            return False
        self.task = Task.KEEP
        for lookup in self._lookups:
            lookup.kept = torch.zeros(num_resident_rows or 0, len(lookup.tables), lookup.dim, device=device)
        return True

    def finish_keeping(self) -> None:
        """From here on, training passes use what was kept."""
        self.task = None
        for lookup in self._lookups:
            lookup.curvatures = {}

    def seen(self) -> LeftOutEmbeddings | None:
        """What was kept, if anything was."""
        kept = [lookup.kept for lookup in self._lookups if lookup.kept is not None]
        return LeftOutEmbeddings(self.scale, tuple(kept)) if self.kept else None

    def reuse(self, seen: LeftOutEmbeddings) -> None:
        """Takes up what an earlier stage kept, in place of measuring, calibrating and keeping."""
        self.scale = seen.scale
        for lookup, embeddings in zip(self._lookups, seen.embeddings, strict=True):
            lookup.kept = embeddings

    def _give(self, batch: DomainBatch) -> None:
        """Makes the pass to come see what was kept, in place of a lookup."""
        for lookup in self._lookups:
            assert lookup.kept is not None and batch.row_positions is not None
            lookup.given = lookup.kept.index_select(0, batch.row_positions)

    def _watch(self) -> None:
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

    def _second_pass(self, logits: Tensor, batch: DomainBatch) -> Tensor:
        """The backbone's logits of a batch -> the model's logits on its route, without the rows' own share."""
        (model,) = self._model
        leaves = [lookup.leaf for lookup in self._lookups if lookup.leaf is not None]
        slopes = torch.autograd.grad(logits.sum(), leaves)
        for lookup in self._lookups:
            lookup.watching = False
        model.router.route = self._route
        for dropout, mode in zip(self._dropouts, self._modes, strict=True):
            dropout.train(mode)
        try:
            with torch.no_grad():
                moves = self._work(logits.detach().reshape(-1).float(), slopes, leaves, batch)
            if self.task is not None:
                return logits.detach()
            return self._pass(batch, leaves, moves, self.scale)
        finally:
            for lookup in self._lookups:
                lookup.given, lookup.leaf = None, None

    def _work(
        self, logits: Tensor, slopes: tuple[Tensor, ...], leaves: list[Tensor], batch: DomainBatch
    ) -> list[Tensor]:
        """Does the task at hand; gives what embeddings move by."""
        p = torch.sigmoid(logits)[:, None, None]
        residuals, features = p - batch.labels[:, None, None], batch.sparse_features
        roots = [(p * (1.0 - p)).sqrt() * slope for slope in slopes]
        if self.task is Task.MEASURE:
            for lookup, root in zip(self._lookups, roots, strict=True):
                lookup.measure(features, root, self._embedding_l2)
            return []
        # the row's share of the penalty goes with its loss: they cancel on average, or all embeddings would shrink
        moves = [
            lookup.moves(features, root, residuals * slope + 2.0 * self._embedding_l2 * leaf)
            for lookup, root, slope, leaf in zip(self._lookups, roots, slopes, leaves, strict=True)
        ]
        if self.task is Task.CALIBRATE:
            self._calibrate(batch, leaves, moves)
        elif self.task is Task.KEEP:
            for lookup, leaf, move in zip(self._lookups, leaves, moves, strict=True):
                assert lookup.kept is not None and batch.row_positions is not None
                lookup.kept.index_copy_(0, batch.row_positions, torch.add(leaf, move, alpha=self.scale))
        return moves

    def _calibrate(self, batch: DomainBatch, leaves: list[Tensor], moves: list[Tensor]) -> None:
        (model,) = self._model
        model.router.route = Route.BASE
        for i, scale in enumerate(SCALES):
            tried = self._pass(batch, leaves, moves, scale).reshape(-1).float()
            self._losses[i] += F.binary_cross_entropy_with_logits(tried, batch.labels, reduction="sum")
        self._losses[-1] += batch.labels.numel()
        model.router.route = self._route

    def _pass(self, batch: DomainBatch, leaves: list[Tensor], moves: list[Tensor], scale: float) -> Tensor:
        (model,) = self._model
        for lookup, leaf, move in zip(self._lookups, leaves, moves, strict=True):
            lookup.given = torch.add(leaf.detach(), move, alpha=scale)
        logits: Tensor = model(batch.dense_features, batch.sparse_features, batch.domains)
        return logits
