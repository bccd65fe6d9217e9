"""Metrics of a finished run on new labelled rows: `python -m torchrec_mdr.evaluate --run RUN --input FILES`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torchrec_mdr.data.table_files import find_files, refuse_input
from torchrec_mdr.inference import Run, load_run
from torchrec_mdr.storage import located, write_json
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence, missing_library


def evaluate(run: str | Run, input: Any) -> dict[str, Any]:
    """Metrics of a run on labelled rows, per domain.

    Args:
        run (str | Run): a run's output folder, or what :func:`~torchrec_mdr.inference.load_run` made of it.
        input (Any): a polars or pandas frame, a path, or a list of paths, see :func:`~torchrec_mdr.predict.predict`.

    Returns:
        dict: `model` and `backbone` (None where there is none), in the form of `test` in `metrics.json`; rows of
        domains that training did not know are the domain `(unknown)`. `left_out` counts bad rows, `first_left_out` says
        where the first one lies and what is wrong.

    Raises:
        ValueError: the folder holds no finished run, a file cannot be read, a column is missing, or no row is good.
    """
    try:
        from torchrec_mdr.inference.predicting import evaluated, table_of
    except ImportError as error:
        raise missing_library(error) from error
    return evaluated(load_run(run, on_demand=True) if isinstance(run, str) else run, table_of(input))


@fail_with_sentence
def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.evaluate", description="Metrics of a finished run per domain on labelled rows."
    )
    parser.add_argument("--run", required=True, help="a run's output folder")
    parser.add_argument("--input", required=True, nargs="+", help="files, folders or globs of rows with labels")
    parser.add_argument("--output", type=str | None, help="a JSON file to write the metrics to")
    given = parser.parse_args(args)
    output = None if given.output is None else located(given.output)  # before any work
    if output is not None:
        refuse_input(output, (path for text in given.input for path in find_files(text, "--input")[0]))
    found = evaluate(given.run, given.input)
    if output is not None:
        write_json(output, found)
    from torchrec_mdr.report.tables import domain_table

    print(domain_table(found["model"], found["backbone"]))
    if found["left_out"]:
        print(f"{found['left_out']} rows are left out; the first: {found['first_left_out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
