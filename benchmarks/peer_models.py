"""How others serve many domains, in plain PyTorch: loops over domains, and adapters that are switched."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain import Embeddings, PlainBatch
from torchrec_mdr.data.schema import Schema

HAMUR_BOTTLENECK, HAMUR_K = 32, 35  # the paper's for MovieLens
SMALL_HIDDEN = {"hamur": 64, "star": 32}  # hidden layer of HAMUR's hyper-network and of STAR's auxiliary one


class DomainLoop(nn.Module):
    """Sends the whole batch through every domain's own path and keeps of each the rows that are its domain's.

    Args:
        schema (Schema): features.
        dim (int): width of the tables.
        num_domains (int): N.
    """

    def __init__(self, schema: Schema, dim: int, num_domains: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(schema, dim)
        self.num_domains = num_domains

    @abstractmethod
    def shared(self, features: Tensor) -> Tensor:
        """What the domains' paths have in common."""

    @abstractmethod
    def path(self, domain: int, features: Tensor, shared: Tensor) -> Tensor:
        """[B, width] -> logits [B, 1], all rows taken for rows of this domain."""

    def forward(self, batch: PlainBatch) -> Tensor:
        """Logits [B]."""
        features = self.embeddings(batch)
        shared = self.shared(features)
        logits = features.new_zeros(features.shape[0])
        for domain in range(self.num_domains):
            logits = torch.where(batch.domains == domain, self.path(domain, features, shared).squeeze(1), logits)
        return logits


class HamurLoop(DomainLoop):
    """HAMUR (Li et al., CIKM 2023): layers of their own for all domains, and a hyper-adapter after the last.

    Each row's two matrices U H V are formed, as the paper writes them. Args: see `DomainLoop`.

    Args:
        hidden (Sequence[int]): widths of the hidden layers.
    """

    def __init__(self, schema: Schema, dim: int, num_domains: int, hidden: Sequence[int]) -> None:
        super().__init__(schema, dim, num_domains)
        widths = [self.embeddings.width, *hidden]
        last, k, bottleneck = widths[-1], HAMUR_K, HAMUR_BOTTLENECK
        self.layers = nn.ModuleList(_hidden_layers(widths) for _ in range(num_domains))
        self.norms = nn.ModuleList(nn.BatchNorm1d(last) for _ in range(num_domains))
        self.scores = nn.ModuleList(nn.Linear(last, 1) for _ in range(num_domains))
        self.hyper = _hidden_layers([widths[0], SMALL_HIDDEN["hamur"], k * k])
        shapes = (last, k), (k, bottleneck), (bottleneck, k), (k, last)
        self.u1, self.v1, self.u2, self.v2 = (nn.Parameter(0.1 * torch.randn(*shape)) for shape in shapes)
        self.b1, self.b2 = nn.Parameter(torch.zeros(bottleneck)), nn.Parameter(torch.zeros(last))

    def shared(self, features: Tensor) -> Tensor:
        """Cores H [B, k, k]."""
        cores: Tensor = self.hyper(features).unflatten(1, (HAMUR_K, HAMUR_K))
        return cores

    def path(self, domain: int, features: Tensor, shared: Tensor) -> Tensor:
        """See `DomainLoop.path`."""
        x = self.layers[domain](features)
        down = torch.sigmoid(torch.bmm(x.unsqueeze(1), self.u1 @ shared @ self.v1).squeeze(1) + self.b1)
        up = torch.bmm(down.unsqueeze(1), self.u2 @ shared @ self.v2).squeeze(1) + self.b2
        logits: Tensor = self.scores[domain](x + self.norms[domain](up))
        return logits


class StarLoop(DomainLoop):
    """STAR (Sheng et al., CIKM 2021): shared weights times a domain's own, partitioned norm, auxiliary network.

    Args: see `HamurLoop`.
    """

    def __init__(self, schema: Schema, dim: int, num_domains: int, hidden: Sequence[int]) -> None:
        super().__init__(schema, dim, num_domains)
        pairs = list(pairwise([self.embeddings.width, *hidden, 1]))
        width, small = self.embeddings.width, SMALL_HIDDEN["star"]
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(num_domains))
        self.centre = nn.ModuleList(nn.Linear(*pair) for pair in pairs)
        self.points = nn.ModuleList(nn.ModuleList(nn.Linear(*pair) for pair in pairs) for _ in range(num_domains))
        self.auxiliary = nn.Sequential(nn.Linear(width, small), nn.ReLU(), nn.Linear(small, 1))

    def shared(self, features: Tensor) -> Tensor:
        """The auxiliary network's logits [B, 1]."""
        logits: Tensor = self.auxiliary(features)
        return logits

    def path(self, domain: int, features: Tensor, shared: Tensor) -> Tensor:
        """See `DomainLoop.path`."""
        x = self.norms[domain](features)
        layers = zip(cast(list[nn.Linear], self.centre), cast(list[nn.Linear], self.points[domain]), strict=True)
        for layer, (centre, own) in enumerate(layers):
            x = F.linear(torch.relu(x) if layer else x, centre.weight * own.weight, centre.bias + own.bias)
        return x + shared


class SwitchedLoRA(nn.Module):
    """A frozen MLP with low-rank adapters of which one is active at a time, as PEFT has them: one domain a batch.

    Args:
        schema (Schema): features.
        dim (int): width of the tables.
        num_domains (int): N.
        hidden (Sequence[int]): widths of the hidden layers.
        alpha (int): ranks are out_features // alpha.
    """

    def __init__(self, schema: Schema, dim: int, num_domains: int, hidden: Sequence[int], alpha: int = 16) -> None:
        super().__init__()
        self.embeddings = Embeddings(schema, dim)
        pairs = list(pairwise([self.embeddings.width, *hidden]))
        self.base = nn.ModuleList(nn.Linear(*pair) for pair in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(out) for _, out in pairs)
        self.score = nn.Linear(hidden[-1], 1)
        self.requires_grad_(False)
        self.adapters = nn.ModuleList(
            nn.ModuleList(_low_rank(into, out, max(out // alpha, 1)) for into, out in pairs) for _ in range(num_domains)
        )

    def train(self, mode: bool = True) -> SwitchedLoRA:
        """Keeps the frozen norms in evaluation mode."""
        super().train(mode)
        self.norms.eval()
        return self

    def forward(self, batch: PlainBatch) -> Tensor:
        """Rows of one domain -> logits [B]."""
        assert batch.domain is not None, "one adapter is active at a time"
        x = self.embeddings(batch)
        adapters = cast(nn.ModuleList, self.adapters[batch.domain])
        for base, norm, adapter in zip(self.base, self.norms, adapters, strict=True):
            x = torch.relu(norm(base(x) + adapter(x)))
        logits: Tensor = self.score(x).squeeze(1)
        return logits


def _hidden_layers(widths: Sequence[int]) -> nn.Sequential:
    pairs = pairwise(widths)
    return nn.Sequential(*(nn.Sequential(nn.Linear(*p), nn.BatchNorm1d(p[1]), nn.ReLU()) for p in pairs))


def _low_rank(in_features: int, out_features: int, rank: int) -> nn.Module:
    up = nn.Linear(rank, out_features)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)
    return nn.Sequential(nn.Linear(in_features, rank, bias=False), up)
