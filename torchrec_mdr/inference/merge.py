"""A plain backbone for one domain."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchrec_mdr.adapters.merging import AdaptedLayer, Merging
from torchrec_mdr.inference.freeze import check_banks, check_plain, replaced
from torchrec_mdr.model import MultiDomainModel


def merge(model: MultiDomainModel, domains: Sequence[str | int | None]) -> nn.Module:
    """The backbone with one domain's adapters in its weights: no adapter, no context, the backbone's own layers.

    Args:
        model (MultiDomainModel): trained, with its tables in this process.
        domains (Sequence[str | int | None]): one of each division, by name or id; None for an unknown one.

    Returns:
        nn.Module: nothing is shared with the model; its state dict has the backbone's names.

    Raises:
        ValueError: a domain that a division does not have, or adapters whose part depends on the row.

    Example::

        >>> from torchrec_mdr.data.schema import Division
        >>> from torchrec_mdr.methods import MLoRA
        >>> class Tower(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden, self.output = nn.Linear(4, 3), nn.Linear(3, 1)
        ...     def forward(self, dense_features, sparse_features):
        ...         return self.output(self.hidden(dense_features))
        >>> model = MultiDomainModel(Tower(), MLoRA(rank=1), [Division("scenario", names=["home", "cart"])], ["hidden"])
        >>> merge(model, ["cart"])
        Tower(
          (hidden): Linear(in_features=4, out_features=3, bias=True)
          (output): Linear(in_features=3, out_features=1, bias=True)
        )
    """
    check_banks(model)
    if len(domains) != len(model.divisions):
        names = ", ".join(division.name for division in model.divisions)
        example = ", ".join(f'"{division.domain_names[0]}"' for division in model.divisions)
        raise ValueError(
            f"merging takes one domain of each division ({names}), not {len(domains)}; name them as a list, such as "
            f"--domain '[{example}]'"
        )
    ids = tuple(division.domain_id(name) for division, name in zip(model.divisions, domains, strict=True))
    merging = Merging(model.method.route, ids)
    merged: dict[int, nn.Module] = {}
    for module in model.backbone.modules():
        if isinstance(module, AdaptedLayer):
            merged[id(module)] = module.merge(merging)
    plain = replaced(model.backbone, merged)
    check_plain(plain, model.method)
    return plain
