"""Puts adapters into a backbone that knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import count

from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_mdr.adapters.bank import LayerAdapter
from torchrec_mdr.adapters.context import DomainContext
from torchrec_mdr.adapters.cross import AdapterCrossNet
from torchrec_mdr.adapters.linear import AdapterLinear
from torchrec_mdr.adapters.norm import DomainNorm

MakeAdapter = Callable[[int, int, int], LayerAdapter]


def inject(
    backbone: nn.Module,
    targets: Sequence[str],
    make_adapter: MakeAdapter,
    context: DomainContext,
    norm_sizes: list[int] | None = None,
) -> list[str]:
    """Replaces the targeted layers by adapted ones, in place; names of base parameters stay as they are.

    Beside a targeted linear layer, the dropout of the module that holds it (attribute ``dropout``) moves between the
    base output and the adapters' part, and its batch norm (attribute ``norm``) becomes a :class:`DomainNorm` where
    norm_sizes is given.

    Args:
        backbone (nn.Module): the model to adapt.
        targets (Sequence[str]): fnmatch patterns over module names, for example ``over_arch.hidden.*.linear``.
        make_adapter (MakeAdapter): called as make_adapter(layer, in_features, out_features), layers counted from 0.
        context (DomainContext): shared by all adapted layers.
        norm_sizes (list[int] | None): number of domains of each division.

    Returns:
        list[str]: names of the replaced modules.

    Raises:
        ValueError: a pattern matches no module, or one that cannot be adapted.
    """
    names = dict(backbone.named_modules())
    matched = matching_modules(backbone, targets)
    layers = count()

    def make_next(in_features: int, out_features: int) -> LayerAdapter:
        return make_adapter(next(layers), in_features, out_features)

    for name in matched:
        parent_name, _, attribute = name.rpartition(".")
        parent = backbone.get_submodule(parent_name)
        module = names[name]
        if isinstance(module, LowRankCrossNet):
            setattr(parent, attribute, AdapterCrossNet(module, make_next, context))
        elif isinstance(module, nn.Linear):
            adapter = make_next(module.in_features, module.out_features)
            dropout = getattr(parent, "dropout", None)
            rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
            if rate:
                parent.dropout = nn.Identity()
            setattr(parent, attribute, AdapterLinear.from_linear(module, adapter, rate, context))
            norm = getattr(parent, "norm", None)
            if norm_sizes is not None and isinstance(norm, nn.BatchNorm1d):
                parent.norm = DomainNorm(norm, norm_sizes, context)
        else:
            raise ValueError(
                f"target '{name}' is a {type(module).__name__}; adapters stand beside nn.Linear or LowRankCrossNet"
            )
    return matched


def matching_modules(backbone: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the modules that match one of the patterns, in the model's order, whatever the patterns' order.

    Raises:
        ValueError: a pattern matches no module.

    Example::

        >>> matching_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0"])
        ['0']
    """
    names = dict(backbone.named_modules())
    matched: set[str] = set()
    for pattern in targets:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            linear = [name for name, module in names.items() if isinstance(module, nn.Linear)]
            raise ValueError(f"target '{pattern}' matches no module; linear layers are {', '.join(linear)}")
        matched.update(found)
    return [name for name in names if name in matched]
