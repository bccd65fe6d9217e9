"""Fine-tune: Mix, then the whole model tuned on every domain by itself (a baseline of MultiLoRA's Tables 3 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from torchrec_mdr.adapters.context import DomainContext, Route
from torchrec_mdr.adapters.domain_module import DomainModule, ParameterGroup
from torchrec_mdr.adapters.norm import DomainNorm
from torchrec_mdr.baselines.base import Baseline
from torchrec_mdr.baselines.domain_tables import give_domains_tables
from torchrec_mdr.baselines.layer_bank import LayerBank, LinearBank, ModuleBank, layer_bank, replace_layers
from torchrec_mdr.data.schema import Division
from torchrec_mdr.methods.stage import ADAPTERS, EMBEDDINGS, Stage, pretrain_stage


class TunedLinearBank(LinearBank):
    """Copies of a linear layer that train while it is frozen."""

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS


class TunedModuleBank(ModuleBank):
    """Copies of any other layer that train while it is frozen."""

    parameter_group: ClassVar[ParameterGroup] = ParameterGroup.ADAPTERS


class TunedLayer(nn.Module, DomainModule):
    """A layer and, for the DOMAIN route, a copy of it per domain. The layer's parameters keep their names.

    Args:
        layer (nn.Module): the backbone's; its parameters are shared, not copied.
        bank (LayerBank): the copies.
        context (DomainContext): where forward finds route and domains.
    """

    def __init__(self, layer: nn.Module, bank: LayerBank, context: DomainContext) -> None:
        super().__init__()
        # as a child it would lengthen its parameters' names, so they are registered here, and it hides in a tuple
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self._modules.update(layer._modules)
        self.base = (layer,)
        self.domains = bank
        self.context = context

    def reset_parameters(self) -> None:
        """Gives the layer its initial values; its copies take them where their stage starts."""
        reset = getattr(self.base[0], "reset_parameters", None)
        if reset is not None:
            reset()

    def start_stage(self, route: Route, division: int, domains: Tensor | None = None) -> None:
        """See :class:`DomainModule`: copies of the pretrained layer."""
        if route is Route.DOMAIN:
            self.domains.copy_layer(self.base[0], domains)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] through the layer, or through each row's own copy, by the route of the pass under way."""
        state = self.context.state
        if state.route is Route.BASE:
            y: Tensor = self.base[0](x)
            return y
        y = self.domains(x, state.groups(self.domains.division))
        return y


@dataclass(frozen=True)
class Finetune(Baseline):
    """Pretrain on the rows of all domains, then tune a full copy of the model per domain on that domain's rows.

    Copies start from the pretrained model, which counts as a candidate for each domain's best, as for adapters.

    Args:
        embeddings (bool): whether the embeddings are copied and tuned too, as in the paper (its Table 7 counts them).
            Every table then holds the pretrained part and one per domain.

    Example::

        >>> [stage.name for stage in Finetune().stages([Division("scenario", 3)])]
        ['pretrain', 'adapt']
    """

    embeddings: bool = True

    needs_backbone_targets: ClassVar[bool] = False
    # its domains train whole copies of the backbone
    stage_settings: ClassVar[Mapping[str, Any]] = {"stages.adapt.backbone_noise": True}

    def wrap(
        self, backbone: nn.Module, targets: Sequence[str], divisions: Sequence[Division], context: DomainContext
    ) -> nn.Module:
        """See `Method.wrap`."""
        num_domains = divisions[0].num_domains
        if self.embeddings:
            give_domains_tables(backbone, num_domains, True, context)

        def tuned(layer: nn.Module) -> nn.Module:
            if isinstance(layer, nn.BatchNorm1d):
                return DomainNorm(layer, [num_domains], context)
            return TunedLayer(layer, layer_bank(layer, num_domains, TunedLinearBank, TunedModuleBank), context)

        replace_layers(backbone, tuned)
        return backbone

    def stages(self, divisions: Sequence[Division]) -> list[Stage]:
        """Pretrain, and tune every domain as if alone."""
        trains = frozenset({EMBEDDINGS, ADAPTERS} if self.embeddings else {ADAPTERS})
        return [pretrain_stage(), Stage("adapt", "adapt", trains, Route.DOMAIN, per_domain=True)]
