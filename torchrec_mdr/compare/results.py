"""Reads what runs have left, as tables: one line a run, and one line a run and domain."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from torchrec_mdr.compare.grid import data_name
from torchrec_mdr.compare.plan import PRETRAIN, Run, flat_options
from torchrec_mdr.compare.run import CONFIG_FILE, METRICS_FILE, Workplace
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.storage import read_json, read_text, write_text

_KEYS = {
    "dataset": pl.String,
    "division": pl.String,
    "backbone": pl.String,
    "variant": pl.String,
    "method": pl.String,
    "seed": pl.Int64,
}
RUN_SCHEMA: dict[str, Any] = {
    **_KEYS,
    "status": pl.String,  # finished, refused, failed or waiting
    "reason": pl.String,
    "auc": pl.Float64,
    "wauc": pl.Float64,
    "logloss": pl.Float64,
    "ne": pl.Float64,
    "calibration": pl.Float64,
    "rows": pl.Int64,
    "backbone_auc": pl.Float64,
    "backbone_wauc": pl.Float64,
    "backbone_logloss": pl.Float64,
    "validation_auc": pl.Float64,  # of the last stage
    "parameters_embeddings": pl.Int64,
    "parameters_backbone": pl.Int64,
    "parameters_adapters": pl.Int64,
    "parameters_gate": pl.Int64,
    "trained_last_stage": pl.Int64,
    "trained": pl.Int64,  # by all stages but the pretraining
    "share_of_interaction": pl.Float64,  # `trained`, of the pretrained backbone without embeddings
    "samples_per_second": pl.Float64,  # of the last stage that was timed
    "samples_per_second_stages": pl.String,
    "seconds": pl.Float64,  # of all stages, a shared pretraining included
    "seconds_pretraining": pl.Float64,
    "seconds_stages": pl.String,
    "shared_backbone": pl.String,
}
DOMAIN_SCHEMA: dict[str, Any] = {
    **_KEYS,
    "domain": pl.String,
    "rows": pl.Int64,
    "auc": pl.Float64,
    "logloss": pl.Float64,
    "ne": pl.Float64,
    "calibration": pl.Float64,
    "backbone_auc": pl.Float64,
    "backbone_logloss": pl.Float64,
    "gain_low": pl.Float64,  # ends of the interval of auc - backbone_auc
    "gain_high": pl.Float64,
}


def read_results(runs: Sequence[Run], place: Workplace) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The state of all runs, and the results of those that have finished.

    Args:
        runs (Sequence[Run]): the plan.
        place (Workplace): where they work.

    Returns:
        tuple[DataFrame, DataFrame]: one line a run (`RUN_SCHEMA`), one line a run and domain (`DOMAIN_SCHEMA`).
    """
    lines: list[dict[str, Any]] = []
    domains: list[dict[str, Any]] = []
    for run in runs:
        cell = run.cell
        key = {
            "dataset": data_name(cell.options["dataset"]),
            "division": run.division,
            "backbone": cell.backbone,
            "variant": cell.variant,
            "method": cell.method,
            "seed": cell.seed,
        }
        status, reason = _status(run, place)
        line = {**key, "status": status, "reason": reason}
        if status == "finished":
            folder = place.folder(run)
            metrics = read_json(os.path.join(folder, METRICS_FILE))
            line |= _figures(metrics, _shared_backbone(folder), place)
            domains += [{**key, **one} for one in _domains(metrics)]
        lines.append(line)
    return pl.DataFrame(lines, RUN_SCHEMA), pl.DataFrame(domains, DOMAIN_SCHEMA)


def write_csv(table: pl.DataFrame, path: str) -> None:
    """Writes a table such that the file is there whole or not at all."""
    text = io.StringIO()
    table.write_csv(text)
    write_text(path, text.getvalue())


def _status(run: Run, place: Workplace) -> tuple[str, str | None]:
    if run.refusal is not None:
        return "refused", run.refusal
    if place.finished(run):
        return "finished", None
    failure = place.failures.get(run.key)
    return ("waiting", None) if failure is None else ("failed", f"{failure}; log: {place.log(run.key)}")


def _shared_backbone(folder: str) -> str | None:
    """The name of the pretrained backbone that a run started from; None where it has one of its own."""
    path = flat_options(read_text(os.path.join(folder, CONFIG_FILE))).get("init_checkpoint")
    return None if path is None else os.path.basename(os.path.dirname(os.path.dirname(path)))


def _figures(metrics: Mapping[str, Any], shared: str | None, place: Workplace) -> dict[str, Any]:
    stages = list(metrics["stages"])
    if shared is not None:  # found where the whole folder was moved, too
        path = place.path("backbones", shared, "checkpoints", PRETRAIN)
        stages.insert(0, checkpoint.read_info(path, "entry")["entry"])
    test, parameters, last = metrics["test"], metrics["parameters"], stages[-1]
    backbone = metrics["test_backbone"] or {}
    speeds = [stage["samples_per_second"] for stage in metrics["stages"]]
    trained = sum(stage["trainable_parameters"] for stage in stages if stage["name"] != PRETRAIN)
    return {
        **{name: test.get(name) for name in ("auc", "wauc", "logloss", "ne", "calibration", "rows")},
        **{f"backbone_{name}": backbone.get(name) for name in ("auc", "wauc", "logloss")},
        "validation_auc": last["validation"]["auc"],
        **{f"parameters_{name}": count for name, count in parameters.items()},
        "trained_last_stage": last["trainable_parameters"],
        "trained": trained,
        "share_of_interaction": trained / parameters["backbone"] if stages[0]["name"] == PRETRAIN else None,
        "samples_per_second": next((speed for speed in reversed(speeds) if speed is not None), None),
        "samples_per_second_stages": _by_stage(stages, "samples_per_second"),
        "seconds": sum(stage["seconds"] for stage in stages),
        "seconds_pretraining": sum(stage["seconds"] for stage in stages if stage["name"] == PRETRAIN),
        "seconds_stages": _by_stage(stages, "seconds"),
        "shared_backbone": shared,
    }


def _by_stage(stages: Sequence[Mapping[str, Any]], name: str) -> str:
    return "; ".join(f"{stage['name']} {stage[name]}" for stage in stages)


def _domains(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    backbone = (metrics["test_backbone"] or {"domains": {}})["domains"]
    gains = metrics.get("gain", {}).get("domains", {})
    lines = []
    for name, domain in metrics["test"]["domains"].items():
        line = {"domain": name, **{key: domain.get(key) for key in ("rows", "auc", "logloss", "ne", "calibration")}}
        line |= {f"backbone_{key}": backbone.get(name, {}).get(key) for key in ("auc", "logloss")}
        lines.append(line | {f"gain_{end}": gains.get(name, {}).get(end) for end in ("low", "high")})
    return lines
