"""PLE: progressive layered extraction (Tang et al., RecSys 2020), with domains for tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.experts import ExpertLayer, ExpertLinear, mix_experts
from torchrec_mdr.baselines.layer_bank import LinearBank
from torchrec_mdr.baselines.over_arch import HiddenLayerInfo, OverArchInfo, check_depth, over_arch_info
from torchrec_mdr.baselines.towers import DomainHiddenLayer, Towers
from torchrec_mdr.data.schema import Division
from torchrec_mdr.ops.groups import DomainGroups


@dataclass(frozen=True)
class Sizes:
    """How many experts a level has.

    Args:
        domains (int): N.
        specific (int): experts of each domain.
        shared (int): experts of all domains.
    """

    domains: int
    specific: int
    shared: int


class ExtractionLevel(nn.Module):
    """A level below the last: a path per domain and a shared one, each a mixture of experts.

    The shared path mixes all domains' experts, so each row goes through all of them.

    Args:
        sizes (Sizes): numbers of experts.
        in_features (int): width of a path's input.
        like (HiddenLayerInfo): the backbone's layer that an expert is modelled on.
    """

    def __init__(self, sizes: Sizes, in_features: int, like: HiddenLayerInfo) -> None:
        super().__init__()
        self.sizes = sizes
        self.specific = ExpertLayer(sizes.domains, in_features, like, copies=sizes.specific)
        self.shared = ExpertLayer(1, in_features, like, copies=sizes.shared)
        self.gates = ExpertLinear(sizes.domains, in_features, sizes.specific + sizes.shared, bias=False)
        self.shared_gate = nn.Linear(in_features, sizes.domains * sizes.specific + sizes.shared, bias=False)

    def forward(self, paths: Tensor) -> Tensor:
        """Inputs of the paths [B, N + 1, in_features], the shared one last, or of all [B, in_features] -> outputs."""
        sizes = self.sizes
        own, common = (paths, paths) if paths.dim() == 2 else (paths[:, : sizes.domains], paths[:, sizes.domains])
        specific = self.specific(own).unflatten(2, (sizes.specific, -1))
        shared = self.shared(common).view(specific.shape[0], sizes.shared, -1)
        weights = torch.softmax(self.gates(own), dim=2)
        mixed = (weights[:, :, : sizes.specific].unsqueeze(3) * specific).sum(2)
        mixed = torch.baddbmm(mixed, weights[:, :, sizes.specific :], shared)
        everything = torch.cat([specific.flatten(1, 2), shared], dim=1)
        return torch.cat([mixed, mix_experts(self.shared_gate(common), everything).unsqueeze(1)], dim=1)


class LastLevel(nn.Module):
    """The last level: a row needs its own domain's experts and the shared ones alone (a CGC).

    Args:
        sizes (Sizes): numbers of experts.
        in_features (int): width of a path's input.
        like (HiddenLayerInfo): the backbone's layer that an expert is modelled on.
    """

    def __init__(self, sizes: Sizes, in_features: int, like: HiddenLayerInfo) -> None:
        super().__init__()
        self.sizes = sizes
        self.specific = DomainHiddenLayer.like(sizes.domains, in_features, like, copies=sizes.specific)
        self.shared = ExpertLayer(1, in_features, like, copies=sizes.shared)
        self.gate = LinearBank(sizes.domains, in_features, sizes.specific + sizes.shared, bias=False)

    def forward(self, paths: Tensor, groups: DomainGroups) -> Tensor:
        """Inputs as in :class:`ExtractionLevel` -> [B, out_features] of each row's own domain's path."""
        own = common = paths
        if paths.dim() == 3:
            index = groups.ids.view(-1, 1, 1).expand(-1, 1, paths.shape[2])
            own, common = paths.gather(1, index).squeeze(1), paths[:, self.sizes.domains]
        specific = self.specific(own, groups).unflatten(1, (self.sizes.specific, -1))
        shared = self.shared(common).view(specific.shape[0], self.sizes.shared, -1)
        return mix_experts(self.gate(own, groups), torch.cat([specific, shared], dim=1))


class PLEOverArch(nn.Module):
    """Takes an over arch's place: levels of experts, then each row's own domain's tower.

    Args:
        sizes (Sizes): numbers of experts of every level.
        num_levels (int): levels, one hidden layer of the backbone each.
        info (OverArchInfo): the backbone's layers.
        context (DomainContext): where forward finds the rows' domains.
    """

    def __init__(self, sizes: Sizes, num_levels: int, info: OverArchInfo, context: DomainContext) -> None:
        super().__init__()
        widths = [info.in_features, *(layer.linear.out_features for layer in info.hidden)]
        levels = list(zip(widths, info.hidden[:num_levels], strict=False))
        self.levels = nn.Sequential(*(ExtractionLevel(sizes, width, layer) for width, layer in levels[:-1]))
        self.last = LastLevel(sizes, *levels[-1])
        self.towers = Towers(sizes.domains, widths[num_levels], info.hidden[num_levels:])
        self.context = context

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_features] -> logits [B, 1]."""
        groups = self.context.state.groups(0)
        logits: Tensor = self.towers(self.last(self.levels(features), groups), groups)
        return logits


@dataclass(frozen=True)
class PLE(Baseline):
    """Levels of experts, some of one domain and some shared; the shared path of a level sees all of the level below.

    Widths are the backbone's: each level is one hidden layer, the hidden layers above and the score are a tower.

    Args:
        num_levels (int): levels of experts, at least 1; with 1 it is the paper's CGC.
        num_specific_experts (int): experts of each domain in each level, at least 1.
        num_shared_experts (int): experts of all domains in each level, at least 1.

    Example::

        >>> [stage.name for stage in PLE().stages([Division("scenario", 3)])]
        ['train']
    """

    num_levels: int = 2
    num_specific_experts: int = 1
    num_shared_experts: int = 1

    def __post_init__(self) -> None:
        for option in ("num_levels", "num_specific_experts", "num_shared_experts"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, not {getattr(self, option)}")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        sizes = Sizes(divisions[0].num_domains, self.num_specific_experts, self.num_shared_experts)
        info = over_arch_info(backbone, targets, type(self).__name__)
        check_depth("num_levels", self.num_levels, info)
        backbone.over_arch = PLEOverArch(sizes, self.num_levels, info, context)
        return backbone
