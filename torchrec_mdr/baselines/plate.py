"""PLATE: a prompt-enhanced paradigm for multi-scenario recommendations (Wang et al., SIGIR 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.models.dlrm import SparseArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.adapters.bank import Bank
from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.over_arch import over_arch_info
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.stage import ADAPTERS, Stage, pretrain_stage

USER = "plate_user"  # where the prompts find the users' embeddings of this pass
HIDDEN = 32  # width of the two hidden layers between a user and the weights of the meta embeddings
PROMPT_STD = 0.01  # of prompts at the start


class KeepUser(nn.Module):
    """Keeps the users' embeddings of a pass for the prompts; a module of its own as the pipeline's tracer wants it.

    Args:
        features (list[int]): positions of the users' features among the embeddings.
        context (DomainContext): where they are kept.
    """

    def __init__(self, features: list[int], context: DomainContext) -> None:
        super().__init__()
        self.features = features
        self.context = context

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, F, D], given back as they are."""
        users = [embeddings[:, feature] for feature in self.features]
        self.context.state.cache[USER] = torch.cat(users, dim=1)
        return embeddings


class UserSparseArch(SparseArch):
    """A backbone's sparse arch that keeps the users' embeddings.

    Args:
        arch (SparseArch): the backbone's; its tables are shared, not copied.
        keep (KeepUser): what keeps them.
    """

    def __init__(self, arch: SparseArch, keep: KeepUser) -> None:
        super().__init__(arch.embedding_bag_collection)
        self.keep = keep
        self.train(arch.training)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Ids of B rows -> embeddings [B, F, D]."""
        embeddings: Tensor = self.keep(super().forward(features))
        return embeddings


class DomainPrompts(Bank):
    """One prompt per domain.

    Args:
        num_domains (int): N.
        width (int): of a prompt.
    """

    def __init__(self, num_domains: int, width: int) -> None:
        super().__init__(num_domains)
        self.prompts = nn.Parameter(torch.empty(num_domains, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the prompts anew."""
        self.prompts.normal_().mul_(PROMPT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Domains int64 [B] -> prompts [B, width]."""
        return self.prompts.index_select(0, ids)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Sets weights and bias to zero."""
        super().reset_parameters()  # draws, so that layers after it start as they would behind any layer
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class UserPrompts(nn.Module):
    """``softmax(MLP(user) / T)`` times the meta embeddings.

    The MLP's last layer starts at zero, so that all users start from the mean of the meta embeddings
    (docs/departures.md).

    Args:
        in_features (int): width of the users' embeddings.
        width (int): of a prompt.
        num_meta (int): meta embeddings.
        temperature (float): T.
    """

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS

    def __init__(self, in_features: int, width: int, num_meta: int, temperature: float) -> None:
        super().__init__()
        last = ZeroLinear(HIDDEN, num_meta)
        self.mlp = nn.Sequential(
            *(nn.Linear(in_features, HIDDEN), nn.ReLU()), *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()), last
        )
        self.meta = nn.Parameter(torch.empty(num_meta, width))
        self.temperature = temperature
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the meta embeddings anew."""
        self.meta.normal_().mul_(PROMPT_STD)

    def forward(self, users: Tensor) -> Tensor:
        """Users [B, in_features] -> prompts [B, width]."""
        return torch.softmax(self.mlp(users) / self.temperature, dim=1) @ self.meta


class TunedLinear(nn.Module):
    """The copy of the first linear layer that is tuned, with the columns that the prompts meet.

    Args:
        linear (nn.Linear): the backbone's.
        prompt_width (int): of all prompts together; their columns start at zero.
    """

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS

    def __init__(self, linear: nn.Linear, prompt_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = nn.Parameter(linear.bias.detach().clone()) if linear.bias is not None else None
        self.prompt_weight = nn.Parameter(torch.zeros(linear.out_features, prompt_width))

    def reset_parameters(self) -> None:
        """Sets all to zero; where a stage starts, the layer takes the pretrained one's values."""
        nn.init.zeros_(self.prompt_weight)
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, prompts: Tensor, x: Tensor) -> Tensor:
        """Prompts [B, prompt_width] in front of the input [B, in_features] -> [B, out_features]."""
        return F.linear(x, self.weight, self.bias) + F.linear(prompts, self.prompt_weight)


class PromptedLinear(nn.Linear, DomainModule):
    """The first linear layer with prompts in front of its input, off the BASE route. The base keeps its names.

    Args:
        linear (nn.Linear): the backbone's; its parameters are shared, not copied.
        domain_prompts (DomainPrompts): what every domain has.
        user_prompts (UserPrompts): what every user gets.
        prompt_width (int): of both together.
        context (DomainContext): where forward finds route, domains and users.
    """

    def __init__(
        self,
        linear: nn.Linear,
        domain_prompts: DomainPrompts,
        user_prompts: UserPrompts,
        prompt_width: int,
        context: DomainContext,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.domain_prompts = domain_prompts
        self.user_prompts = user_prompts
        self.tuned = TunedLinear(linear, prompt_width)
        self.context = context
        self.train(linear.training)

    @torch.no_grad()
    def start_stage(self, route: Route, division: int, domains: Tensor | None = None) -> None:
        """See :class:`DomainModule`: tunes from the pretrained layer on, which all domains share."""
        if route is not Route.BASE:
            self.tuned.weight.copy_(self.weight)
            if self.tuned.bias is not None:
                self.tuned.bias.copy_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features], by the route of the pass under way."""
        state = self.context.state
        if state.route is Route.BASE:
            return super().forward(input)
        prompts = [self.domain_prompts(state.groups(0).ids), self.user_prompts(state.cache[USER])]
        y: Tensor = self.tuned(torch.cat(prompts, dim=1), input)
        return y


@dataclass(frozen=True)
class Plate(Baseline):
    """Pretrain without prompts, then tune prompts of domains and users and the layer they enter, the rest frozen.

    Prompts are as wide as an embedding and stand before the input of the first hidden layer of the MLP; "the linear
    layer" that is tuned with them is that layer, one for all domains (docs/departures.md). Tuning starts from the
    pretrained model.

    Args:
        num_meta (int): meta embeddings that a user's prompt is mixed from.
        temperature (float): T of the softmax that mixes them (docs/departures.md).
        user_features (list[str] | None): sparse features that say who the user is; the first one where left out.

    Example::

        >>> [stage.name for stage in Plate().stages([Division("scenario", 3)])]
        ['pretrain', 'adapt']
    """

    num_meta: int = 10
    temperature: float = 0.1
    user_features: list[str] | None = None

    # rows cannot be left out of tables whose ids are not in the data
    stage_settings: ClassVar[Mapping[str, Any]] = {"stages.adapt.hooks": []}

    def __post_init__(self) -> None:
        if self.num_meta < 1:
            raise ValueError(f"num_meta must be at least 1, not {self.num_meta}")
        if self.temperature <= 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.user_features is not None and not self.user_features:
            raise ValueError("user_features must name at least one sparse feature; leave it out for the first one")

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        first = over_arch_info(backbone, targets, type(self).__name__).hidden[0]
        arch = getattr(backbone, "sparse_arch", None)
        if not isinstance(arch, SparseArch):
            raise ValueError(
                f"Plate needs the users' embeddings, and {type(backbone).__name__} has no "
                "torchrec.models.dlrm.SparseArch named sparse_arch"
            )
        features = self._user_positions(list(arch.sparse_feature_names))
        backbone.sparse_arch = UserSparseArch(arch, KeepUser(features, context))
        layer = backbone.get_submodule(first.name)
        (attribute,) = (name for name, child in layer.named_children() if child is first.linear)
        users = UserPrompts(len(features) * arch.D, arch.D, self.num_meta, self.temperature)
        prompted = PromptedLinear(first.linear, DomainPrompts(num_domains, arch.D), users, 2 * arch.D, context)
        setattr(layer, attribute, prompted)
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain and tune."""
        return [pretrain_stage(), Stage("adapt", "adapt", frozenset({ADAPTERS}), Route.DOMAIN)]

    def _user_positions(self, names: list[str]) -> list[int]:
        wanted = self.user_features if self.user_features is not None else names[:1]
        for name in wanted:
            if name not in names:
                raise ValueError(
                    f"user_features names '{name}', which is no sparse feature; they are {', '.join(names)}"
                )
        return [names.index(name) for name in wanted]
