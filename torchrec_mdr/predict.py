"""Scores rows by a finished run: `python -m torchrec_mdr.predict --run RUN --input FILES --output FILE`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torchrec_mdr.inference import Run, Scorer, load_run
from torchrec_mdr.training.command import SentenceParser, fail_with_sentence, missing_library, quiet_libraries

if TYPE_CHECKING:
    import polars as pl


def predict(
    run: str | Run | Scorer, input: Any, *, output: str | None = None, keep: Sequence[str] = ()
) -> pl.DataFrame | None:
    """Scores rows in their order: the probability of a positive label.

    Rows are raw ones, in the form of those that `prepare` took; the run's `features.yaml` says how they become
    features. Where the run's data came another way, they are rows in the form of its prepared Parquet files. No label
    is needed. A row of a domain that training did not know is scored by the backbone, and marked. A bad row has an
    empty score and a reason; the number of rows stays.

    Args:
        run (str | Run | Scorer): a run's output folder, or what :func:`~torchrec_mdr.inference.load_run` made of it; or
            an open bundle, whose scores are calibrated where it is.
        input (Any): a polars or pandas frame, a path, or a list of paths: files, folders or globs.
        output (str | None): a file to write, .parquet or .csv, some rows at a time.
        keep (Sequence[str]): columns to give back beside the scores; `["*"]` is all of them.

    Returns:
        pl.DataFrame | None: the kept columns, `score`, `unknown_domain` and `reason`; None where a file is written.

    Raises:
        ValueError: the folder holds no finished run, a file cannot be read or written, or a column is missing.

    Example::

        >>> import tempfile
        >>> import polars as pl
        >>> from torchrec_mdr.prepare import prepare
        >>> from torchrec_mdr.train import train
        >>> folder = tempfile.mkdtemp()
        >>> clicks = {"shop": ["Oslo", "Rome"] * 500, "item": list(range(10)) * 100, "clicked": [0, 1, 1, 0] * 250}
        >>> rows = pl.DataFrame(clicks)
        >>> data = prepare(input=rows, label="clicked", domain="shop", output=f"{folder}/data")
        >>> short = {"stages.pretrain.epochs": 1, "stages.adapt.epochs": 1}
        >>> result = train(data, output_dir=f"{folder}/run", method="mlora", batch_size=128, **short)
        results go to ...
        >>> new = pl.DataFrame({"shop": ["Rome", "Kiev"], "item": [1, 7]})
        >>> scores = predict(f"{folder}/run", new, keep=["shop"])
        >>> scores["shop"].to_list(), scores["unknown_domain"].to_list(), scores["score"].is_between(0, 1).all()
        (['Rome', 'Kiev'], [None, 'shop'], True)
    """
    try:
        import polars as pl

        from torchrec_mdr.data.table_files import refuse_input
        from torchrec_mdr.inference.predicting import predicted, table_of
        from torchrec_mdr.inference.score_file import ScoreFile
    except ImportError as error:
        raise missing_library(error) from error
    file = None if output is None else ScoreFile(output)  # before any work
    table = table_of(input)
    if output is not None:
        refuse_input(output, (part.path for part in table.parts))
    if file is not None and file.kind == ".csv":
        kept = table.columns if "*" in keep else keep
        nested = [name for name in kept if table.types.get(name, pl.Null()).is_nested()]
        if nested:
            raise ValueError(f"--keep names '{nested[0]}', which holds lists, and CSV holds none; write .parquet")
    frames: Iterator[pl.DataFrame] = predicted(
        load_run(run, on_demand=True) if isinstance(run, str) else run, table, keep
    )
    if file is None:
        return pl.concat(frames)
    with file:
        for frame in frames:
            file.write(frame)
    return None


@fail_with_sentence
def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = SentenceParser(
        prog="python -m torchrec_mdr.predict",
        description="Scores rows by a run or a bundle, in their order: columns score, unknown_domain and reason.",
    )
    parser.add_argument("--run", type=str | None, help="a run's output folder")
    parser.add_argument("--bundle", type=str | None, help="a bundle, in place of a run")
    parser.add_argument("--input", required=True, nargs="+", help="files, folders or globs of rows; no label is needed")
    parser.add_argument("--output", required=True, help="the file to write, .parquet or .csv")
    parser.add_argument("--keep", nargs="+", default=[], help="columns to write beside the scores; '*' is all of them")
    given = parser.parse_args(args)
    if (given.run is None) == (given.bundle is None):
        raise ValueError("give --run, a run's output folder, or --bundle, what torchrec_mdr.export made of one")
    with quiet_libraries():
        model = given.run if given.bundle is None else Scorer(given.bundle)
        predict(model, given.input, output=given.output, keep=given.keep)
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
