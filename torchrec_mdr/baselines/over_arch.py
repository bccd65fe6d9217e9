"""The MLP part of a backbone, for methods that put something in its place or into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from torchrec_mdr.adapters.injection import matching_modules


@dataclass(frozen=True)
class HiddenLayerInfo:
    """One hidden layer of a backbone.

    Args:
        name (str): of the module that is the whole layer: linear, dropout, norm, activation.
        linear (nn.Linear): its linear part.
        dropout (float): share of the linear's output that is dropped in training.
        norm (nn.BatchNorm1d | None): its norm.
    """

    name: str
    linear: nn.Linear
    dropout: float
    norm: nn.BatchNorm1d | None


@dataclass(frozen=True)
class OverArchInfo:
    """The MLP part of a backbone: hidden layers in a chain, then one layer that scores.

    Args:
        hidden (tuple[HiddenLayerInfo, ...]): at least one.
        output (nn.Linear): gives the logit.
    """

    hidden: tuple[HiddenLayerInfo, ...]
    output: nn.Linear

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.hidden[0].linear.in_features


def over_arch_info(backbone: nn.Module, targets: Sequence[str], method: str) -> OverArchInfo:
    """Looks at the MLP part of a backbone: the child `over_arch`, with the targeted layers in it as hidden layers.

    Args:
        backbone (nn.Module): one of this package, TorchRec's DLRM or DLRM_DCN, or one like them.
        targets (Sequence[str]): the layers that adapters may wrap, patterns over module names.
        method (str): who asks, for the error.

    Raises:
        ValueError: the backbone has no such part.
    """
    why = f"{method} needs a backbone with an MLP named over_arch, and {type(backbone).__name__}"
    over_arch = getattr(backbone, "over_arch", None)
    if not isinstance(over_arch, nn.Module):
        raise ValueError(f"{why} has none; choose another backbone")
    names = dict(backbone.named_modules())
    hidden: list[HiddenLayerInfo] = []
    for name in matching_modules(backbone, targets):
        linear = names[name]
        if not (name.startswith("over_arch.") and isinstance(linear, nn.Linear)):
            continue
        layer = name.rpartition(".")[0]
        inside = [module for module in names[layer].modules() if isinstance(module, nn.Linear)]
        if hidden and hidden[-1].linear.out_features != linear.in_features or len(inside) != 1:
            raise ValueError(f"{why} has hidden layers that are no chain of modules of their own at '{name}'")
        dropout, norm = getattr(names[layer], "dropout", None), getattr(names[layer], "norm", None)
        rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        hidden.append(HiddenLayerInfo(layer, linear, rate, norm if isinstance(norm, nn.BatchNorm1d) else None))
    if not hidden:
        raise ValueError(f"{why} has no hidden layer in it that may be adapted")
    known = {id(layer.linear) for layer in hidden}
    others = [m for m in over_arch.modules() if isinstance(m, nn.Linear) and id(m) not in known]
    if len(others) != 1 or others[0].in_features != hidden[-1].linear.out_features:
        raise ValueError(f"{why} does not end in one layer that scores what its hidden layers give")
    return OverArchInfo(tuple(hidden), others[0])


def check_depth(option: str, value: int, info: OverArchInfo) -> None:
    """Raises ValueError where an option asks for more hidden layers than there are, or for less than none."""
    if not 0 <= value <= len(info.hidden):
        depth = len(info.hidden)
        raise ValueError(f"{option} is {value}, but the backbone has {depth} hidden layers; choose at most {depth}")
