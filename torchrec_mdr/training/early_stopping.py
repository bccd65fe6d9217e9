"""What counts as the best result of a stage, and when it stops."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from torchrec_mdr.adapters.domain_module import OwnedRows


class EarlyStopping(Protocol):
    """Watches validation results; its state travels in the checkpoints of a stage under way."""

    def update(self, overall: float, per_domain: Tensor) -> bool:
        """Takes a validation's result; True where the model as a whole is the best so far."""

    @property
    def done(self) -> bool:
        """Whether the stage may stop."""

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
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: float | None = None
        self.waited = 0

    def update(self, overall: float, per_domain: Tensor) -> bool:
        """See :class:`EarlyStopping`."""
        if self.best is None or overall > self.best:
            self.best, self.waited = overall, 0
            return True
        self.waited += 1
        return False

    @property
    def done(self) -> bool:
        """See :class:`EarlyStopping`."""
        return self.waited >= self.patience

    def info(self) -> dict[str, Any]:
        """See :class:`EarlyStopping`."""
        return {"best": self.best, "waited": self.waited}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the best model lies in a checkpoint."""
        return {}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See :class:`EarlyStopping`."""
        self.best, self.waited = info["best"], info["waited"]


class BestPerDomain:
    """Keeps each domain's own best adapter, so that no domain's result depends on another's.

    A domain without a defined AUC in the validation rows keeps its start.

    Args:
        owned (dict[str, OwnedRows]): what trains, by name; the names of shares that differ by rank differ too.
        domains (Tensor): bool [N], the domains that train.
        patience (int): validations without a better result before a domain is frozen.
    """

    def __init__(self, owned: dict[str, OwnedRows], domains: Tensor, patience: int) -> None:
        self.owned = owned
        self.patience = patience
        self.best = torch.full((domains.numel(),), -torch.inf, dtype=torch.float64)
        self.waited = torch.zeros(domains.numel(), dtype=torch.int64)
        self.waited[~domains] = patience
        self.kept = {name: rows.tensor.clone() for name, rows in owned.items()}

    @torch.no_grad()
    def update(self, overall: float, per_domain: Tensor) -> bool:
        """See :class:`EarlyStopping`; per_domain float64 [N], NaN where a domain has no AUC."""
        better = (per_domain > self.best) & ~self.frozen
        self.best = torch.where(better, per_domain, self.best)
        self.waited = torch.where(better, 0, self.waited + 1)
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

    def info(self) -> dict[str, Any]:
        """See :class:`EarlyStopping`."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`EarlyStopping`."""
        return {"best": self.best, "waited": self.waited, **{f"kept.{name}": t for name, t in self.kept.items()}}

    def restore(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """See :class:`EarlyStopping`."""
        self.best, self.waited = tensors["best"].cpu(), tensors["waited"].cpu()
        self.kept = {name: tensors[f"kept.{name}"] for name in self.kept}

    @torch.no_grad()
    def put_back(self) -> None:
        """Puts every domain's best state in place."""
        for name, rows in self.owned.items():
            rows.tensor.copy_(self.kept[name])
