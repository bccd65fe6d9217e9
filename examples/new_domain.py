"""A domain that comes later: a new adapter on the old model, against training everything again.

    python examples/new_domain.py --data_dir DIR --output_dir OUT

MovieLens-1M by age group, users of 56 and more as the newcomers: the old model has seen none of their rows, nor of
their ids. `new adapter` trains their adapter alone, on an old checkpoint; `retrained` is MLoRA on all rows. Finished
runs are not repeated. Writes `new_domain.json` and `new_domain.md`: AUC on test rows, seconds and parameters written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from tabulate import tabulate

from torchrec_mdr.data.datasets.base import Choice
from torchrec_mdr.data.datasets.movielens_1m import MovieLens1M
from torchrec_mdr.data.schema import SPLITS, Division, Schema, domain_column
from torchrec_mdr.data.writer import write_split
from torchrec_mdr.prepare import prepare
from torchrec_mdr.storage import is_store, write_json, write_text

DIVISION = "age"
VARIANTS = ("backbone", "new adapter", "retrained")


def write_data(source: str, folder: Path) -> tuple[Path, Path]:
    """Prepared data with the newcomers' ids behind all others, and the same without the newcomers."""
    schema = Schema.load(source)
    everyone, old = folder / "everyone", folder / "old"
    division = schema.division(DIVISION)
    newcomer = division.num_domains - 1
    frames = {split: pl.read_parquet(f"{source}/{split}.parquet") for split in SPLITS}
    rows = pl.concat(frames.values())
    known = rows.filter(pl.col(domain_column(DIVISION)) != newcomer)
    features = []
    for feature in schema.sparse_features:
        ids = pl.concat([known[feature.name].unique().sort(), rows[feature.name].unique().sort()]).unique(
            maintain_order=True
        )
        mapping = dict(zip(ids.to_list(), range(len(ids)), strict=True))
        frames = {
            split: frame.with_columns(pl.col(feature.name).replace_strict(mapping)) for split, frame in frames.items()
        }
        features.append((feature, len(ids), known[feature.name].n_unique()))
    for place, column, last in ((everyone, 1, division.num_domains), (old, 2, newcomer)):
        place.mkdir(parents=True, exist_ok=True)
        kept = {split: frame.filter(pl.col(domain_column(DIVISION)) < last) for split, frame in frames.items()}
        for split, frame in kept.items():
            write_split(str(place), split, [{name: frame[name].to_numpy() for name in frame.columns}])
        named = Division(DIVISION, last, division.domain_names[:last])
        replace(
            schema,
            sparse_features=tuple(replace(sizes[0], num_embeddings=sizes[column]) for sizes in features),
            divisions=tuple(named if other.name == DIVISION else other for other in schema.divisions),
            rows={split: len(frame) for split, frame in kept.items()},
        ).save(str(place))
    return everyone, old


def settings(folder: Path) -> Path:
    """A file with MovieLens-1M's own settings, which a folder of prepared data does not bring."""
    path = folder / "settings.yaml"
    choice = Choice(method="mlora", backbone="mlp", paper="mlora", protocol="mlora", recipe="recommended")
    write_text(str(path), yaml.safe_dump(MovieLens1M.defaults(choice)))
    return path


def train(folder: Path, data: Path, seed: int, *options: str) -> dict[str, Any]:
    """Trains in a process of its own, unless it is done; gives `metrics.json`."""
    done = folder / "metrics.json"
    if not done.exists():
        command = [sys.executable, "-m", "torchrec_mdr.train", "--method=mlora", f"--config={settings(folder.parent)}"]
        command += [f"--dataset={data}", f"--division={DIVISION}", f"--seed={seed}", f"--output_dir={folder}", *options]
        if (folder / "config.yaml").exists():
            command.append("--resume")
        print(f"== {folder.name}", flush=True)
        subprocess.run(command, check=True)
    metrics: dict[str, Any] = json.loads(done.read_text())
    return metrics


def compare(everyone: Path, old: Path, folder: Path, seed: int, options: list[str]) -> dict[str, dict[str, float]]:
    """One seed's figures by variant."""
    before = folder / f"old-{seed}"
    train(before, old, seed, *options)
    newcomer = Schema.load(str(everyone)).division(DIVISION).num_domains - 1
    stage = ["--stage=adapt", f"--domains=[{newcomer}]", f"--init_checkpoint={before / 'checkpoints' / 'adapt'}"]
    added = train(folder / f"added-{seed}", everyone, seed, *stage, *options)
    again = train(folder / f"retrained-{seed}", everyone, seed, *options)
    counts = again["parameters"]
    parts = {"backbone": added["test_backbone"], "new adapter": added["test"], "retrained": again["test"]}
    stages = {"backbone": [], "new adapter": added["stages"], "retrained": again["stages"]}
    written = [0, counts["adapters"] // (newcomer + 1), counts["embeddings"] + counts["backbone"] + counts["adapters"]]
    figures = {}
    for name, parameters in zip(VARIANTS, written, strict=True):
        *others, new = parts[name]["domains"].values()
        rows = sum(domain["rows"] for domain in others)
        figures[name] = {
            "new domain's AUC": new["auc"],
            "others' WAUC": sum(domain["auc"] * domain["rows"] for domain in others) / rows,
            "seconds": sum(stage["seconds"] for stage in stages[name]),
            "parameters written": parameters,
        }
    return figures


def main() -> None:
    """Runs all seeds and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of MovieLens-1M's original files")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("options", nargs="*", help="further options of torchrec_mdr.train, after --")
    read = parser.parse_args()
    if is_store(read.output_dir):
        parser.error("--output_dir has to be a folder of this machine")
    folder = Path(read.output_dir).expanduser()
    data = folder / "data"
    if not (data / "old" / "schema.json").exists():
        write_data(prepare("movielens-1m", data_dir=read.data_dir, division=DIVISION, protocol="mlora"), data)
    results = [compare(data / "everyone", data / "old", folder, seed, read.options) for seed in read.seeds]
    write_json(str(folder / "new_domain.json"), {"seeds": read.seeds, "results": results})
    lines = []
    for name in VARIANTS:
        line: dict[str, str] = {"": name}
        for title in results[0][name]:
            values = [result[name][title] for result in results]
            digits = 4 if "AUC" in title else 0
            spread = f" ({min(values):.4f} to {max(values):.4f})" if digits else ""
            line[title] = f"{statistics.mean(values):,.{digits}f}{spread}"
        lines.append(line)
    table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    seeds = ", ".join(map(str, read.seeds))
    write_text(str(folder / "new_domain.md"), f"Seeds {seeds}, mean (lowest to highest):\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
