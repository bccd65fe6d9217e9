"""The command ``python -m torchrec_mdr.experiments.rank_divisions``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from tabulate import tabulate

import torchrec_mdr.experiments.rank_divisions as method
from torchrec_mdr.data.schema import Schema
from torchrec_mdr.experiments.rank_divisions.ranking import DivisionScore, rank_divisions
from torchrec_mdr.registry import DATASETS
from torchrec_mdr.storage import full_path, is_store, isdir, write_json
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence
from torchrec_mdr.training.datasets import open_dataset

# more natural domains than these are in the JSON file only
MAX_COLUMNS = 8


@fail_with_sentence
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.experiments.rank_divisions",
        description=method.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(DATASETS)
    parser.add_argument("--dataset", required=True, help=f"a folder of prepared data (with a slash), or one of {names}")
    parser.add_argument("--division", type=str | None, help="the natural division; by default the data set's first")
    parser.add_argument("--candidates", type=str | None, help="divisions to rank, with commas; by default all others")
    parser.add_argument("--data_dir", type=str | None, help="folder of the original files, for a data set by name")
    parser.add_argument("--protocol", type=str | None, help="multilora or mlora, for a data set by name")
    parser.add_argument("--max_rows", type=int, default=2_000_000, help="a larger training split is sampled")
    parser.add_argument("--output", type=str | None, help="a JSON file to write the ranking to")
    read = parser.parse_args(arguments)
    output = read.output and full_path(read.output)
    if output and not is_store(output) and not isdir(os.path.dirname(output)):
        raise ValueError(f"the folder of --output {read.output} does not exist; create it")
    folder = open_dataset(read.dataset, data_dir=read.data_dir, division=read.division, protocol=read.protocol)
    candidates = (
        None if read.candidates is None else [name.strip() for name in read.candidates.split(",") if name.strip()]
    )
    scores = rank_divisions(folder, read.division, candidates, read.max_rows)
    schema = Schema.load(folder)
    natural = read.division or schema.divisions[0].name
    print(ranking_table(scores, natural))
    if output:
        content = {"dataset": schema.dataset, "natural": natural, "unit": "nats per row", "method": method.__doc__}
        write_json(output, {**content, "ranking": [asdict(score) for score in scores]})
    return 0


def ranking_table(scores: Sequence[DivisionScore], natural: str) -> str:
    """The ranking as it is printed.

    Args:
        scores (Sequence[DivisionScore]): at least one, best first.
        natural (str): the natural division.

    Returns:
        str: a table, and how to read it.
    """
    domains = list(scores[0].domains)
    shown = domains if len(domains) <= MAX_COLUMNS else []
    lines = []
    for rank, score in enumerate(scores, 1):
        largest = max(score.features, key=lambda name: score.features[name], default="-")
        line = [str(rank), score.division, str(score.num_domains), _number(score.score), _number(score.standard_error)]
        lines.append([*line, largest, *(_number(score.domains[name].score) for name in shown)])
    headers = ["", "division", "domains", "score", "std. error", "most under", *(f"in {name}" for name in shown)]
    align = ["right", "left", "right", "right", "right", "left", *["right"] * len(shown)]
    rows = sum(domain.rows for domain in scores[0].domains.values())
    return (
        f"{tabulate(lines, headers, disable_numparse=True, colalign=align)}\n"
        f"Scores are 1e-4 nats per row: what knowing how the division's domains differ, feature by feature within the\n"
        f"domains of '{natural}', saves in log loss on held-out folds of {rows:,} training rows (--help says how).\n"
        f"A score within two standard errors of 0, or below 0, shows no difference."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else format(1e4 * value, "+z.2f")


if __name__ == "__main__":
    sys.exit(main())
