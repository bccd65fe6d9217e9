"""Puts adapters into a backbone that knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import count

from torch import nn
from torch.nn.utils import parametrize
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

    Beside a targeted linear layer that is the only one of the module that holds it, that module's dropout (attribute
    ``dropout``) moves between the base output and the adapters' part, and its batch norm (attribute ``norm``) becomes a
    :class:`DomainNorm` where norm_sizes is given. Elsewhere both stay where and what they are.

    Args:
        backbone (nn.Module): the model to adapt.
        targets (Sequence[str]): fnmatch patterns over module names, for example ``over_arch.hidden.*.linear``.
        make_adapter (MakeAdapter): called as make_adapter(layer, in_features, out_features), layers counted from 0.
        context (DomainContext): shared by all adapted layers.
        norm_sizes (list[int] | None): number of domains of each division.

    Returns:
        list[str]: names of the replaced modules.

    Raises:
        ValueError: a pattern matches no module, or one that cannot be adapted: of another kind, with a forward of its
            own, with hooks or a parametrization, or shared. Nothing is changed then.
    """
    matched = matching_modules(backbone, targets)
    layers = count()

    def make_next(in_features: int, out_features: int) -> LayerAdapter:
        return make_adapter(next(layers), in_features, out_features)

    _check(backbone, matched)
    for name in matched:
        parent_name, _, attribute = name.rpartition(".")
        parent, module = backbone.get_submodule(parent_name), backbone.get_submodule(name)
        with next(module.parameters()).device:  # so that adapters lie where the layer does, on the meta device, too
            if isinstance(module, LowRankCrossNet):
                setattr(parent, attribute, AdapterCrossNet(module, make_next, context))
                continue
            assert isinstance(module, nn.Linear)
            adapter = make_next(module.in_features, module.out_features)
            dropout, norm = _beside(parent, "dropout"), _beside(parent, "norm")
            rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
            if rate:
                parent.dropout = nn.Identity()
            setattr(parent, attribute, AdapterLinear.from_linear(module, adapter, rate, context))
            if norm_sizes is not None and isinstance(norm, nn.BatchNorm1d):
                parent.norm = DomainNorm(norm, norm_sizes, context)
    return matched


def _beside(parent: nn.Module, attribute: str) -> nn.Module | None:
    """A module that belongs to the one linear layer of its parent; None where it may belong to others, and so stays."""
    linear = [child for child in parent.children() if isinstance(child, nn.Linear)]
    found = getattr(parent, attribute, None) if len(linear) == 1 else None
    return found if isinstance(found, nn.Module) else None  # and no rate, as an attention has one


def _check(backbone: nn.Module, matched: Sequence[str]) -> None:
    """Raises ValueError for a layer that an adapted one cannot take the place of, before anything is changed."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in backbone.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for name in matched:
        module = backbone.get_submodule(name)
        parent = backbone.get_submodule(name.rpartition(".")[0])
        why = _cannot_be_adapted(module)
        if why is not None:
            raise ValueError(f"target '{name}' {why}; leave it out of target_modules, or change the layer")
        beside = [_beside(parent, "dropout"), _beside(parent, "norm")] if isinstance(module, nn.Linear) else []
        for one in [module, *beside]:
            if one is not None and len(names[one]) > 1:
                raise ValueError(
                    f"a {type(one).__name__} is shared: it is called {' and '.join(repr(n) for n in names[one])}, and "
                    "adapters belong to one place; give each place a module of its own, or leave them out of "
                    "target_modules"
                )


def _cannot_be_adapted(module: nn.Module) -> str | None:
    """Why no adapters can stand beside a layer; None where they can."""
    kind = type(module)
    if not isinstance(module, nn.Linear | LowRankCrossNet):
        return f"is a {kind.__name__}; adapters stand beside nn.Linear or LowRankCrossNet"
    if parametrize.is_parametrized(module):
        return "is parametrized, and an adapted layer would lose the parametrization"
    plain = nn.Linear.forward if isinstance(module, nn.Linear) else LowRankCrossNet.forward
    if kind.forward is not plain or "forward" in vars(module):
        return f"is a {kind.__name__} with a forward of its own, which an adapted layer would not run"
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(hooks):
        return "has hooks, which an adapted layer would not run"
    return None


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
