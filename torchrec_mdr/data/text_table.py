"""Reads a text file of one row a line, and names the line where it is faulty."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from torchrec_mdr.storage import read_bytes

_MEND = "restore the original file"


def read_text_table(path: str, separator: str, fields: Sequence[str], numbers: Sequence[str]) -> pl.DataFrame:
    """Reads a file whose lines hold the same fields, in latin-1, without quotes or a header.

    Args:
        path (str): the file.
        separator (str): between two fields.
        fields (Sequence[str]): names of the fields, in their order.
        numbers (Sequence[str]): those that are whole numbers.

    Returns:
        pl.DataFrame: a column each field, int32 where it is a number, in the order of the lines.

    Raises:
        ValueError: the file is missing or empty, or one of its lines is faulty.
    """
    try:
        content = read_bytes(path)
    except ValueError as error:
        raise ValueError(f"{error}; point --data_dir at the folder of the original files") from error
    # no splitlines, which also splits at characters inside titles
    lines = content.decode("latin-1").replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; {_MEND}")
    text = pl.DataFrame({"line": lines})
    counts = text["line"].str.count_matches(separator, literal=True) + 1
    wrong = (counts != len(fields)).arg_true()
    if len(wrong):
        raise ValueError(
            f"{path}, line {wrong[0] + 1}: {counts[wrong[0]]} fields where {len(fields)} are expected, separated by "
            f"{separator!r}: {', '.join(fields[:5])}{', ...' if len(fields) > 5 else ''}; {_MEND}"
        )
    split = text.select(pl.col("line").str.split_exact(separator, len(fields) - 1).struct.rename_fields(list(fields)))
    table = split.unnest("line")
    parsed = table.with_columns(pl.col(name).cast(pl.Int32, strict=False) for name in numbers)
    for name in numbers:
        bad = parsed[name].is_null().arg_true()
        if len(bad):
            raise ValueError(
                f"{path}, line {bad[0] + 1}: {name} is '{table[name][bad[0]]}', which is no whole number; {_MEND}"
            )
    return parsed


def refuse_rows(table: pl.DataFrame, path: str, field: str, faulty: pl.Expr, wanted: str) -> None:
    """Raises ValueError for the first line where an expression is true.

    Args:
        table (pl.DataFrame): what :func:`read_text_table` gave.
        path (str): its file.
        field (str): the field that is wrong there.
        faulty (pl.Expr): true in faulty rows.
        wanted (str): what the field ought to be.
    """
    bad = table.select(faulty.alias("bad"))["bad"].arg_true()
    if len(bad):
        raise ValueError(f"{path}, line {bad[0] + 1}: {field} is '{table[field][bad[0]]}', not {wanted}; {_MEND}")
