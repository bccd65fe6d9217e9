"""Runs the methods on MovieLens-1M and writes one table.

    python examples/movielens_table.py --data_dir DIR --output_dir OUT

Per seed and division one backbone is pretrained and shared by all methods. Finished runs are not repeated, so an
interrupted table goes on where it stopped. Nothing is tuned here: settings are the defaults of the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

METHODS = {
    "multilora": {
        "single_lora": ["--method=single_lora"],
        "multilora-add": ["--method=multilora", "--method_options.fusion=add"],
        "multilora-avg": ["--method=multilora", "--method_options.fusion=avg"],
        "multilora": ["--method=multilora"],
    },
    "mlora": {"mlora": ["--method=mlora"], "moe_mlora": ["--method=moe_mlora"]},
}


def run(name: str, arguments: list[str], done: str) -> None:
    """Trains in a process of its own, unless the file or folder it ends with is there."""
    if os.path.exists(done):
        return
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", "torchrec_mdr.train", *arguments]
    if os.path.exists(os.path.join(os.path.dirname(done), "config.yaml")):
        command.append("--resume")
    subprocess.run(command, check=True)


def train_all(options: argparse.Namespace, division: str, seed: int) -> dict[str, dict[str, Any]]:
    """Trains backbone and methods for one division and seed; gives the test results by name."""
    folder = os.path.join(options.output_dir, f"{options.protocol}-{options.recipe}-{division}-{seed}")
    common = [
        "--dataset=movielens-1m",
        f"--data_dir={options.data_dir}",
        f"--protocol={options.protocol}",
        f"--recipe={options.recipe}",
        f"--backbone={options.backbone}",
        f"--division={division}",
        f"--seed={seed}",
        *options.train_options,
    ]
    backbone = os.path.join(folder, "backbone")
    checkpoint = os.path.join(backbone, "checkpoints", "pretrain")
    first = "single_lora" if options.protocol == "multilora" else "mlora"
    pretrain = [*common, f"--method={first}", "--stage=pretrain", f"--output_dir={backbone}"]
    if not os.path.isdir(checkpoint):
        run(f"{folder}/backbone", pretrain, checkpoint)
    results: dict[str, dict[str, Any]] = {}
    for name, method in METHODS[options.protocol].items():
        output = os.path.join(folder, name)
        arguments = [*common, *method, f"--init_checkpoint={checkpoint}", f"--output_dir={output}"]
        run(output, arguments, os.path.join(output, "metrics.json"))
        with open(os.path.join(output, "metrics.json")) as file:
            metrics = json.load(file)
        results.setdefault("backbone", metrics["test_backbone"])
        results[name] = metrics["test"]
    return results


def table(results: list[dict[str, dict[str, Any]]]) -> str:
    """Markdown: per method the mean over seeds and the spread (highest less lowest) of each figure."""
    domains = list(results[0]["backbone"]["domains"])
    shown = domains if len(domains) <= 3 else []
    lines = ["| method | " + " | ".join([*shown, "total AUC", "WAUC", "log loss"]) + " |"]
    lines.append("|---" * (len(shown) + 4) + "|")
    for name in results[0]:
        columns = [[result[name]["domains"][domain]["auc"] for result in results] for domain in shown]
        columns += [[result[name][key] for result in results] for key in ("auc", "wauc", "logloss")]
        cells = [f"{statistics.mean(column):.4f} ± {(max(column) - min(column)) / 2:.4f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and prints the tables; writes them into `table-PROTOCOL-RECIPE.md` as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--protocol", default="multilora", choices=METHODS)
    parser.add_argument("--recipe", default="recommended", choices=["paper", "recommended"])
    parser.add_argument("--backbone", default="mlp")
    parser.add_argument("--divisions", nargs="+", help="by default age3, or gender age occupation for protocol mlora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("train_options", nargs="*", help="further options of torchrec_mdr.train, after --")
    options = parser.parse_args()
    divisions = options.divisions or (["age3"] if options.protocol == "multilora" else ["gender", "age", "occupation"])
    path = os.path.join(options.output_dir, f"table-{options.protocol}-{options.recipe}.md")
    text = ""
    for division in divisions:
        results = [train_all(options, division, seed) for seed in options.seeds]
        text += f"\n{options.protocol} / {division}, {options.backbone}, seeds {options.seeds}:\n\n{table(results)}\n"
        with open(path, "w") as file:
            file.write(text)
    print(text)


if __name__ == "__main__":
    main()
