"""The settings that variants must have in common, or the comparison is of settings and not of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchrec_mdr.compare.grid import Grid, data_name
from torchrec_mdr.compare.plan import Run
from torchrec_mdr.registry import METHODS

_COMMON = ("protocol", "recipe", "batch_size", "adaptation_share")
_COMMON_GROUPS = ("embeddings", "backbone_options", "dataset_options")
_COMMON_OF_STAGES = ("embedding_l2", "weight_decay")


def check_settings(grid: Grid, runs: Sequence[Run]) -> None:
    """Raises ValueError where variants differ in a setting that none of them names itself.

    A setting that a variant names under its own `options` is meant to differ; one that a method cannot do without is
    its own, too. `unequal: true` in the grid file lets all others differ.
    """
    if grid.unequal:
        return
    for group, own in _groups(runs).items():
        for name, values in _common(own).items():
            found = {run.cell.variant: value for run, value in values if not _is_asked(run, name)}
            kinds = {repr(value): variant for variant, value in reversed(found.items())}
            if len(kinds) > 1:
                (value, variant), (other_value, other) = list(kinds.items())[-1], list(kinds.items())[0]
                raise ValueError(
                    f"on {', '.join(group)}, '{name}' is {value} for variant '{variant}' and {other_value} for "
                    f"'{other}', so their results would not say which method is better; name one value under "
                    "'options', or let settings differ with 'unequal: true'"
                )


def settings_facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Names and values of the settings in common, for each data set, division and backbone; and where they differ."""
    facts = []
    for group, own in _groups(runs).items():
        texts = []
        for name, values in _common(own).items():
            kinds: dict[str, list[str]] = {}
            for run, value in values:
                variants = kinds.setdefault(str(value), [])
                if run.cell.variant not in variants:
                    variants.append(run.cell.variant)
            if len(kinds) == 1:
                texts.append(f"{name} {next(iter(kinds))}")
            else:
                texts.append(f"{name} " + ", ".join(f"{kind} ({', '.join(who)})" for kind, who in kinds.items()))
        facts.append((f"settings on {', '.join(group)}", "; ".join(texts)))
    return facts


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[Run]]:
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if run.refusal is None:
            key = (data_name(run.cell.options["dataset"]), run.division, run.cell.backbone)
            groups.setdefault(key, []).append(run)
    return groups


def _common(runs: Sequence[Run]) -> dict[str, list[tuple[Run, Any]]]:
    """The values of common settings, by name, of the runs that have each."""
    values: dict[str, list[tuple[Run, Any]]] = {}
    for run in runs:
        for name, value in run.resolved.items():
            first, *rest = name.split(".")
            of_stage = first == "stages" and rest[-1] in _COMMON_OF_STAGES
            if (name in _COMMON and value is not None) or first in _COMMON_GROUPS or of_stage:
                values.setdefault(name, []).append((run, value))
    return values


def _is_asked(run: Run, name: str) -> bool:
    """Whether a variant differs because its own entry, or its method, says so."""
    return name in run.cell.own or name in METHODS[run.cell.method].stage_settings
