"""What counts as the best result of a stage, and when it stops."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchrec_mdr.adapters.domain_module import OwnedRows


class LogLosses(NamedTuple):
    """Log losses of a validation.

    Args:
        overall (float): of all rows.
        per_domain (Tensor): of each domain, float64 [N], NaN where it has no rows.
    """

    overall: float
    per_domain: Tensor


class EarlyStopping(Protocol):
    """Watches validation results; its state travels in the checkpoints of a stage under way."""

    def update(self, overall: float, per_domain: Tensor, guard: LogLosses | None = None) -> bool:
        """Takes a validation's result; True where the model as a whole is the best so far.

        Args:
            overall (float): what has to get higher.
            per_domain (Tensor): the same of each domain, float64 [N], NaN where a domain has none.
            guard (LogLosses | None): of the same validation, for a tolerance.
        """

    @property
    def done(self) -> bool:
        """Whether the stage may stop."""

    @property
    def improved(self) -> bool:
        """Whether a later result was better than the first, of any domain."""

    def info(self) -> dict[str, Any]:
        """Numbers, for JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors, by name."""

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes up the state that info and tensors gave."""


class BestOverall:
    """Keeps the one best model.

    Args:
        patience (int): validations without a better result before the stage stops.
        logloss_tolerance (float | None): how far, as a share, the log loss of what is kept may lie above the lowest so
            far; None lets the monitored figure alone decide.

    Example::

        >>> selection, none = BestOverall(patience=3, logloss_tolerance=0.02), torch.empty(0)
        >>> results = [(0.7, 0.6), (0.71, 0.79), (0.69, 0.5)]  # AUC and log loss: the second is overfitted
        >>> [selection.update(auc, none, LogLosses(logloss, none)) for auc, logloss in results]
        [True, False, True]
    """

    def __init__(self, patience: int, logloss_tolerance: float | None = None) -> None:
        self.patience = patience
        self.tolerance = logloss_tolerance
        self.best: float | None = None
        self.logloss, self.lowest = math.inf, math.inf
        self.waited = 0
        self.times_better = 0

    def update(self, overall: float, per_domain: Tensor, guard: LogLosses | None = None) -> bool:
        """See :class:`EarlyStopping`."""
        logloss = math.inf if guard is None else guard.overall
        self.lowest = min(self.lowest, logloss)
        better = self.best is None or overall > self.best
        if self.tolerance is not None:
            most = self.lowest * (1.0 + self.tolerance)
            better = logloss <= most and (better or self.logloss > most)
        if better:
            self.best, self.logloss, self.waited = overall, logloss, 0
            self.times_better += 1
            return True
        self.waited += 1
        return False

    @property
    def done(self) -> bool:
        """See :class:`EarlyStopping`."""
        return self.waited >= self.patience

    @property
    def improved(self) -> bool:
        """See :class:`EarlyStopping`."""
        return self.times_better > 1

    def info(self) -> dict[str, Any]:
        """See :class:`EarlyStopping`."""
        info: dict[str, Any] = {"best": self.best, "waited": self.waited, "times_better": self.times_better}
        if self.tolerance is not None:
            info |= {"logloss": self.logloss, "lowest_logloss": self.lowest}
        return info

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the best model lies in a checkpoint."""
        return {}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See :class:`EarlyStopping`."""
        self.best, self.waited = info["best"], info["waited"]
        self.times_better = info.get("times_better", 1)
        self.logloss, self.lowest = info.get("logloss", math.inf), info.get("lowest_logloss", math.inf)


class BestAboveStart(BestOverall):
    """Keeps the start of a stage until something better comes, where training does not go on from the start.

    The first result is the start's. Patience goes by the results after it alone, which may begin far below.

    Args:
        patience (int): see :class:`BestOverall`.
        logloss_tolerance (float | None): see :class:`BestOverall`; also how far above the start's the log loss of what
            takes its place may lie. Nothing takes it whose monitored figure is not higher.

    Example::

        >>> selection, none = BestAboveStart(patience=2), torch.empty(0)
        >>> [(selection.update(auc, none), selection.done) for auc in (0.7, 0.6, 0.65, 0.71, 0.69)]
        [(True, False), (False, False), (False, False), (True, False), (False, False)]
    """

    def __init__(self, patience: int, logloss_tolerance: float | None = None) -> None:
        super().__init__(patience, logloss_tolerance)
        self.start: float | None = None
        self.start_logloss = math.inf
        self.times_above = 0

    def update(self, overall: float, per_domain: Tensor, guard: LogLosses | None = None) -> bool:
        """See :class:`EarlyStopping`."""
        logloss = math.inf if guard is None else guard.overall
        if self.start is None:
            self.start, self.start_logloss = overall, logloss
            return True
        better = super().update(overall, per_domain, guard) and overall > self.start
        if self.tolerance is not None:
            better = better and logloss <= self.start_logloss * (1.0 + self.tolerance)
        self.times_above += better
        return better

    @property
    def improved(self) -> bool:
        """See :class:`EarlyStopping`."""
        return self.times_above > 0

    def info(self) -> dict[str, Any]:
        """See :class:`EarlyStopping`."""
        own = {"start": self.start, "times_above": self.times_above}
        return {**super().info(), **own, **({} if self.tolerance is None else {"start_logloss": self.start_logloss})}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See :class:`EarlyStopping`."""
        super().restore(info, tensors)
        self.start, self.times_above = info["start"], info["times_above"]
        self.start_logloss = info.get("start_logloss", math.inf)


class BestPerDomain:
    """Keeps each domain's own best adapter, so that no domain's result depends on another's.

    A domain without a defined result in the validation rows keeps its start.

    Args:
        owned (dict[str, OwnedRows]): what trains, by name; the names of shares that differ by rank differ too. Rows of
            sharded banks, of which nobody keeps a copy, are not among them: for them it remembers steps.
        domains (Tensor): bool [N], the domains that train.
        patience (int): validations without a better result before a domain is frozen.
        logloss_tolerance (float | None): see :class:`BestOverall`; of each domain by itself.
        step (int): of the stage, at which it starts; to be set before each update.
    """

    def __init__(
        self,
        owned: dict[str, OwnedRows],
        domains: Tensor,
        patience: int,
        logloss_tolerance: float | None = None,
        step: int = 0,
    ) -> None:
        self.owned = owned
        self.step = step
        self.patience = patience
        self.tolerance = logloss_tolerance
        self.best = torch.full((domains.numel(),), -torch.inf, dtype=torch.float64)
        self.logloss, self.lowest = (torch.full_like(self.best, torch.inf) for _ in range(2))
        self.waited = torch.zeros(domains.numel(), dtype=torch.int64)
        self.best_step = torch.full_like(self.waited, step)
        self.waited[~domains] = patience
        self.times_better = torch.zeros_like(self.waited)
        self.kept = {name: rows.tensor.clone() for name, rows in owned.items()}

    @torch.no_grad()
    def update(self, overall: float, per_domain: Tensor, guard: LogLosses | None = None) -> bool:
        """See :class:`EarlyStopping`."""
        better = per_domain > self.best
        logloss = self.logloss
        if self.tolerance is not None and guard is not None:
            logloss = guard.per_domain
            self.lowest = torch.fmin(self.lowest, logloss)
            most = self.lowest * (1.0 + self.tolerance)
            better = (logloss <= most) & (better | ((self.logloss > most) & per_domain.isfinite()))
        better &= ~self.frozen
        self.logloss = torch.where(better, logloss, self.logloss)
        self.best = torch.where(better, per_domain, self.best)
        self.best_step[better] = self.step
        self.waited = torch.where(better, 0, self.waited + 1)
        self.times_better += better
        better = torch.cat([better, better.new_zeros(1)])  # the last for the owner -1
        for name, rows in self.owned.items():
            mask = better.to(rows.owners.device)[rows.owners].view(-1, *[1] * (rows.tensor.dim() - 1))
            self.kept[name] = torch.where(mask, rows.tensor, self.kept[name])
        return True

    @property
    def frozen(self) -> Tensor:
        """Bool [N], domains whose patience has run out."""
        return self.waited >= self.patience

    @property
    def done(self) -> bool:
        """See :class:`EarlyStopping`."""
        return bool(self.frozen.all())

    @property
    def improved(self) -> bool:
        """See :class:`EarlyStopping`."""
        return bool((self.times_better > 1).any())

    def info(self) -> dict[str, Any]:
        """See :class:`EarlyStopping`."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`EarlyStopping`."""
        kept = {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        guard = {} if self.tolerance is None else {"logloss": self.logloss, "lowest_logloss": self.lowest}
        counts = {"waited": self.waited, "times_better": self.times_better, "best_step": self.best_step}
        return {"best": self.best, **counts, **guard, **kept}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See :class:`EarlyStopping`."""
        self.best, self.waited = tensors["best"].cpu(), tensors["waited"].cpu()
        self.times_better = tensors["times_better"].cpu()
        if "best_step" in tensors:  # which checkpoints of older versions lack, and had no use for
            self.best_step = tensors["best_step"].cpu()
        if self.tolerance is not None:
            self.logloss, self.lowest = tensors["logloss"].cpu(), tensors["lowest_logloss"].cpu()
        self.kept = {name: tensors[f"kept.{name}"] for name in self.kept}

    @torch.no_grad()
    def put_back(self) -> None:
        """Puts every domain's best state in place."""
        for name, rows in self.owned.items():
            rows.tensor.copy_(self.kept[name])
