"""Which method works on which backbone, by building each pair: `python -m torchrec_mdr.compare.compatibility`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn

from torchrec_mdr.data.schema import Division, Schema, SparseFeature
from torchrec_mdr.model import MultiDomainModel
from torchrec_mdr.registry import BACKBONES, METHODS

# of no data set: two divisions, and features of both kinds
SCHEMA = Schema(
    dataset="none",
    label="label",
    sparse_features=tuple(SparseFeature(name, 8) for name in ("sparse_0", "sparse_1", "sparse_2")),
    dense_features=("dense_0", "dense_1"),
    divisions=(Division("natural", 3), Division("auxiliary", 2)),
    rows={},
)
EMBEDDING_DIM = 8


@dataclass(frozen=True)
class Pair:
    """A method on a backbone.

    Args:
        method (str): a key of METHODS.
        backbone (str): a key of BACKBONES.
        divisions (tuple[Division, ...]): those the method is built for: one, or two where it takes no single one.
        refusal (str | None): why the pair cannot be built; None where it can.
    """

    method: str
    backbone: str
    divisions: tuple[Division, ...]
    refusal: str | None

    def build(self) -> MultiDomainModel:
        """The model, its tables on the meta device.

        Raises:
            ValueError: the pair cannot be built.
        """
        return _build(self.method, self.backbone, self.divisions)


def pairs() -> list[Pair]:
    """Every method on every backbone, the methods in the order of METHODS.

    Example::

        >>> {one.method for one in pairs() if one.backbone == "mlp" and len(one.divisions) == 2}
        {'multilora'}
    """
    return [pair(method, backbone) for method in METHODS for backbone in BACKBONES]


def method_backbone_matrix() -> str:
    """The pairs as a Markdown table: stages of each method, and where it works; below it, why not elsewhere."""
    reasons: list[str] = []
    rows = []
    for method in METHODS:
        row = [f"`{method}`", ", ".join(_stages(method))]
        for backbone in BACKBONES:
            refusal = pair(method, backbone).refusal
            if refusal is not None and refusal not in reasons:
                reasons.append(refusal)
            row.append("yes" if refusal is None else f"no ({reasons.index(refusal) + 1})")
        rows.append(row)
    headers = ["method", "stages", *(f"`{backbone}`" for backbone in BACKBONES)]
    notes = "".join(f"\n{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return tabulate(rows, headers, tablefmt="github") + (f"\n{notes}" if notes else "")


def pair(method: str, backbone: str) -> Pair:
    """A method on a backbone, built once to see whether it can be."""
    found = Pair(method, backbone, SCHEMA.divisions, None)
    for count in range(1, len(SCHEMA.divisions) + 1):
        divisions = SCHEMA.divisions[:count]
        try:
            _build(method, backbone, divisions)
        except ValueError as error:
            found = Pair(method, backbone, divisions, str(error))
        else:
            return Pair(method, backbone, divisions, None)
    return found


def _build(method: str, backbone: str, divisions: tuple[Division, ...]) -> MultiDomainModel:
    with torch.random.fork_rng(devices=[]):
        plain: nn.Module = BACKBONES[backbone](hidden=(8, 4)).build(SCHEMA, EMBEDDING_DIM)
        return MultiDomainModel(plain, METHODS[method](), divisions)


def _stages(method: str) -> list[str]:
    """Names of the stages, with DIVISION for the name of any division."""
    any_division = [Division("DIVISION", division.num_domains) for division in pair(method, "mlp").divisions]
    return list(dict.fromkeys(stage.name for stage in METHODS[method]().stages(any_division)))


if __name__ == "__main__":
    print(method_backbone_matrix())
