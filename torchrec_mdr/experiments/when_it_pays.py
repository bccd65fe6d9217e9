"""The data and the picture of docs/when_it_pays.md: `python -m torchrec_mdr.experiments.when_it_pays data|draw`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import polars as pl
from tqdm import tqdm

from torchrec_mdr.data.cache import prepared_folder
from torchrec_mdr.data.schema import SCHEMA_FILE
from torchrec_mdr.report.gain_study import BLIND, POINTS, draw, gain_table
from torchrec_mdr.storage import isfile, located, read_bytes
from torchrec_mdr.training.command import fail_with_sentence


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m torchrec_mdr.experiments.when_it_pays", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="writes the prepared folders that examples/when_it_pays.yaml names")
    data.add_argument("--output", required=True, help="a folder; one below it for each data set")
    picture = commands.add_parser("draw", help="draws the picture, and prints the figures in it")
    picture.add_argument("--output_dir", required=True, help="the comparison's output folder")
    picture.add_argument("--output", required=True, help="the picture, SVG or PNG by its ending")
    read = parser.parse_args(arguments)
    if read.command == "data":
        make_data(located(read.output))
        return 0
    path = os.path.join(located(read.output_dir), "results.csv")
    if not isfile(path):
        raise ValueError(f"{path} does not exist; run the comparison of examples/when_it_pays.yaml first")
    runs = pl.read_csv(io.BytesIO(read_bytes(path)))
    draw(runs, located(read.output))
    print(gain_table(runs))
    return 0


def make_data(folder: str) -> None:
    """Writes the study's data sets, each twice: with the domain as a feature, and without."""
    made = {point.name: point.dataset() for point in POINTS}
    made |= {f"{point.name}{BLIND}": point.blind_dataset() for point in POINTS}
    for name, dataset in tqdm(made.items(), desc="data sets"):
        path = os.path.join(folder, name)
        if not isfile(os.path.join(path, SCHEMA_FILE)):
            prepared_folder(dataset, name, output=path)


if __name__ == "__main__":
    sys.exit(main())
