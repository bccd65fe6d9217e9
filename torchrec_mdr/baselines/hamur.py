"""HAMUR: hyper adapters for multi-domain recommendation (Li et al., CIKM 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.adapters.norm import GlobalBatchNorm1d
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.layer_bank import BackboneNormBank, domain_layer, replace_layers
from torchrec_mdr.baselines.over_arch import over_arch_info
from torchrec_mdr.data.schema import Division

CORE = "hamur_core"  # where the adapters find what the hyper-network gave for the rows of this pass


class HyperOverArch(nn.Module):
    """An over arch whose input also goes through the hyper-network, which gives every row a k x k core.

    Args:
        over_arch (nn.Module): the backbone's, with adapters in it.
        in_features (int): width of its input.
        hidden (int): width of the hyper-network's hidden layer.
        k (int): rows and columns of a core.
        context (DomainContext): where the adapters look for the cores.
    """

    def __init__(self, over_arch: nn.Module, in_features: int, hidden: int, k: int, context: DomainContext) -> None:
        super().__init__()
        self.over_arch = over_arch
        self.hyper_net = nn.Sequential(
            *(nn.Linear(in_features, hidden), GlobalBatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, k * k), GlobalBatchNorm1d(k * k), nn.ReLU()),
        )
        self.k = k
        self.context = context

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        self.context.state.cache[CORE] = self.hyper_net(features).unflatten(1, (self.k, self.k))
        logits: Tensor = self.over_arch(features)
        return logits


class HyperAdapter(nn.Module):
    """``norm(sigmoid(x U1 H V1 + b1) U2 H V2 + b2) + x`` with each row's own core H (Li et al.).

    U, V and b are shared, the norm is the domain's own. The two matrices U H V of a row are never formed: a row passes
    U, H and V one after the other, so that a step costs k * k a row and not in_features * bottleneck.

    Args:
        features (int): width of the hidden state.
        bottleneck (int): width between the two products.
        k (int): rows and columns of a core.
        num_domains (int): N.
        context (DomainContext): where forward finds the rows' domains and cores.
    """

    def __init__(self, features: int, bottleneck: int, k: int, num_domains: int, context: DomainContext) -> None:
        super().__init__()
        # Glorot, since with the released code's ones all units of the bottleneck would stay equal (docs/departures.md)
        self.U1, self.V1, self.U2, self.V2 = (
            nn.Parameter(torch.empty(rows, columns))
            for rows, columns in ((features, k), (k, bottleneck), (bottleneck, k), (k, features))
        )
        self.b1 = nn.Parameter(torch.empty(bottleneck))
        self.b2 = nn.Parameter(torch.empty(features))
        self.reset_parameters()
        self.norm = BackboneNormBank(num_domains, features)
        self.context = context

    def reset_parameters(self) -> None:
        """Draws U and V anew and sets b to zero."""
        for matrix in (self.U1, self.V1, self.U2, self.V2):
            nn.init.xavier_uniform_(matrix)
        for bias in (self.b1, self.b2):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, features] -> [B, features]."""
        state = self.context.state
        core = state.cache[CORE]
        down = torch.addmm(self.b1, _times_core(x @ self.U1, core), self.V1)
        up = torch.addmm(self.b2, _times_core(torch.sigmoid(down) @ self.U2, core), self.V2)
        return x + self.norm(up, state.groups(0))


def _times_core(x: Tensor, core: Tensor) -> Tensor:
    """Rows [B, k] times their cores [B, k, k] -> [B, k]."""
    return torch.bmm(x.unsqueeze(1), core).squeeze(1)


@dataclass(frozen=True)
class Hamur(Baseline):
    """An adapter after the last hidden layer, whose core a hyper-network generates for each row.

    Args:
        k (int): rows and columns of the core; the paper's 35 for MovieLens, 65 for Ali-CCP.
        bottleneck (int): width of the adapter's inner layer.
        hyper_hidden (int): width of the hyper-network's hidden layer.
        domain_layers (bool): whether every domain has hidden layers and score of its own, as in the released code,
            whose backbones are multi-domain ones; otherwise domains differ in the adapter's norm alone.

    Example::

        >>> [stage.name for stage in Hamur(k=65).stages([Division("scenario", 3)])]
        ['train']
    """

    k: int = 35
    bottleneck: int = 32
    hyper_hidden: int = 64
    domain_layers: bool = True

    def __post_init__(self) -> None:
        for option in ("k", "bottleneck", "hyper_hidden"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, not {getattr(self, option)}")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        info = over_arch_info(backbone, targets, type(self).__name__)
        over_arch = backbone.over_arch
        assert isinstance(over_arch, nn.Module)
        last = info.hidden[-1]
        layer = backbone.get_submodule(last.name)
        if self.domain_layers:
            replace_layers(over_arch, lambda module: domain_layer(module, num_domains, context))
        adapter = HyperAdapter(last.linear.out_features, self.bottleneck, self.k, num_domains, context)
        parent, _, attribute = last.name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, nn.Sequential(layer, adapter))
        backbone.over_arch = HyperOverArch(over_arch, info.in_features, self.hyper_hidden, self.k, context)
        return backbone
