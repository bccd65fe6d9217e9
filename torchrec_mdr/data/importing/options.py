"""Options of a preparation, as a command line gives them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torchrec_mdr.data.schema import POOLINGS, SPLITS

LABEL = "label"  # its name where a rule makes it and nothing names it


@dataclass
class ImportOptions:
    """How a table of raw rows is prepared. Columns are named with commas between: `user,item`.

    Args:
        input (list[str]): files, folders or globs of rows: Parquet, CSV or JSON lines, also with .gz behind.
        validation_input (list[str]): the same for validation rows, where they are in files of their own.
        test_input (list[str]): the same for test rows.
        label (str | None): the label's column: 0 and 1, -1 and 1, or true and false.
        label_rule (str | None): instead, a condition that positive rows meet, in SQL's words, such as 'rating > 3'.
        domain (str | None): the column that says a row's domain.
        auxiliary (str): further columns that divide the rows.
        weight (str | None): column of the rows' weights in loss and metrics.
        sparse (str): columns that are categories.
        dense (str): columns that are numbers.
        lists (str): columns that hold several categories a row.
        timestamps (str): columns that are dates or times.
        exclude (str): columns to leave out.
        split (str): how rows without files of their own are cut: random:0.8,0.1 or time:COLUMN:0.8,0.1 (the shares of
            training and validation rows), or column:COLUMN, which holds train, validation and test.
        min_count (int): a category with fewer training rows gets the id for unknown ones.
        min_rows (int): domains with fewer training rows are pooled as one.
        hash (str): columns whose ids are hashed, with their number of ids: item:1000000.
        share (list[str]): groups of columns that share a vocabulary: user_a,user_b.
        max_length (int): most entries of a list that are taken.
        pooling (str): how a list's embeddings become one: mean or sum.
        separator (str | None): between the entries of lists that are written as text; found where left out.
        domain_feature (bool): whether the domain is a categorical feature, too.
        report (bool): writes report.html into the output folder.
        seed (int): of the random split.

    Raises:
        ValueError: an option is missing or out of its range, or contradicts another.
    """

    input: list[str] = field(default_factory=list)
    validation_input: list[str] = field(default_factory=list)
    test_input: list[str] = field(default_factory=list)
    label: str | None = None
    label_rule: str | None = None
    domain: str | None = None
    auxiliary: str = ""
    weight: str | None = None
    sparse: str = ""
    dense: str = ""
    lists: str = ""
    timestamps: str = ""
    exclude: str = ""
    split: str = "random:0.8,0.1"
    min_count: int = 2
    min_rows: int = 1
    hash: str = ""
    share: list[str] = field(default_factory=list)
    max_length: int = 50
    pooling: str = "mean"
    separator: str | None = None
    domain_feature: bool = True
    report: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Cut:
    """How rows are cut: at `random`, by `time`, or by a `column`; the shares of training and validation rows."""

    by: str
    column: str | None = None
    shares: tuple[float, float] = (0.8, 0.1)


@dataclass(frozen=True)
class Request:
    """What is asked for, checked as far as it can be without rows; see :class:`ImportOptions`."""

    label: str
    label_column: str | None
    label_rule: str | None
    divisions: tuple[str, ...]
    weight: str | None
    kinds: dict[str, str]
    exclude: tuple[str, ...]
    cut: Cut
    min_count: int
    min_rows: int
    hashed: dict[str, int]
    shared: tuple[tuple[str, ...], ...]
    max_length: int
    pooling: str
    separator: str | None
    domain_feature: bool
    seed: int


def request(options: ImportOptions) -> Request:
    """Reads the options.

    Raises:
        ValueError: see :class:`ImportOptions`.

    Example::

        >>> asked = request(ImportOptions(label="clicked", domain="shop", sparse="user,item", split="time:day"))
        >>> asked.kinds, asked.cut
        ({'user': 'category', 'item': 'category'}, Cut(by='time', column='day', shares=(0.8, 0.1)))
    """
    if options.domain is None:
        raise ValueError("--domain is missing; name the column that says a row's domain")
    if options.label is None and options.label_rule is None:
        raise ValueError("--label is missing; name the label's column, or give a --label_rule such as 'rating > 3'")
    kinds: dict[str, str] = {}
    for option, kind in (("sparse", "category"), ("dense", "number"), ("lists", "list"), ("timestamps", "timestamp")):
        for name in names(getattr(options, option), f"--{option}"):
            if kinds.get(name, kind) != kind:
                raise ValueError(f"column '{name}' is named in --{option} and as a {kinds[name]}; name it once")
            kinds[name] = kind
    for option, least in (("min_count", 1), ("min_rows", 1), ("max_length", 1)):
        if getattr(options, option) < least:
            raise ValueError(f"--{option} must be at least {least}, not {getattr(options, option)}")
    if options.pooling not in POOLINGS:
        raise ValueError(f"--pooling must be {' or '.join(POOLINGS)}, not {options.pooling}")
    divisions = (options.domain, *names(options.auxiliary, "--auxiliary"))
    if len(set(divisions)) < len(divisions):
        raise ValueError(f"--domain and --auxiliary name a column twice: {', '.join(divisions)}")
    shared = tuple(names(group, "--share") for group in options.share)
    for group in shared:
        if len(group) < 2:
            raise ValueError(f"--share {','.join(group)} needs at least two columns, as in user_a,user_b")
    hashed = _hashed(options.hash)
    for name in hashed:
        if any(name in group for group in shared):
            raise ValueError(f"column '{name}' is named in --hash and in --share; hashed ids share no vocabulary")
        if kinds.setdefault(name, "category") not in ("category", "list"):
            raise ValueError(f"--hash: column '{name}' is a {kinds[name]}, and only categories are hashed")
    exclude = names(options.exclude, "--exclude")
    used = {*kinds, *divisions, options.label if options.label_rule is None else None, options.weight}
    for name in exclude:
        if name in used:
            raise ValueError(f"column '{name}' is named in --exclude and in another option; name it once")
    if options.weight is not None and options.weight == options.label:
        raise ValueError(f"--weight: column '{options.weight}' is the label; name another one")
    return Request(
        label=(options.label or LABEL),
        label_column=None if options.label_rule is not None else options.label,
        label_rule=None if options.label_rule is None else options.label_rule.replace("==", "="),
        divisions=divisions,
        weight=options.weight,
        kinds=kinds,
        exclude=exclude,
        cut=_cut(options.split),
        min_count=options.min_count,
        min_rows=options.min_rows,
        hashed=hashed,
        shared=shared,
        max_length=options.max_length,
        pooling=options.pooling,
        separator=options.separator,
        domain_feature=options.domain_feature,
        seed=options.seed,
    )


def names(text: str | Sequence[str], option: str) -> tuple[str, ...]:
    """Names of columns with commas between; one that holds a comma stands in double quotes.

    Example::

        >>> names('user, "a,b"', "--sparse")
        ('user', 'a,b')
    """
    if not isinstance(text, str):
        return tuple(text)
    found = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if text and not all(found):
        raise ValueError(f"{option} '{text}' has an empty name between commas")
    return tuple(found)


def settings(options: ImportOptions) -> dict[str, Any]:
    """The options that differ from their defaults, for the schema's notes."""
    plain = ImportOptions()
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: value for name, value in given.items() if value != getattr(plain, name) and name != "report"}


def _cut(text: str) -> Cut:
    by, _, rest = text.partition(":")
    form = f"--split {text} is none of random:0.8,0.1, time:COLUMN:0.8,0.1 and column:COLUMN"
    if by == "column" and rest:
        return Cut(by, rest)
    column, _, shares = rest.rpartition(":") if by == "time" else (None, "", rest)
    if by == "time" and not column:
        column, shares = rest, ""
    if by not in ("random", "time") or (by == "time" and not column):
        raise ValueError(form)
    try:
        numbers = tuple(float(share) for share in shares.split(",")) if shares else (0.8, 0.1)
    except ValueError:
        if by == "time":  # a colon in the column's name
            return Cut(by, rest)
        raise ValueError(form) from None
    if len(numbers) != len(SPLITS) - 1 or min(numbers) <= 0 or sum(numbers) >= 1:
        raise ValueError(f"{form}: the shares of training and validation rows must be positive and leave some to test")
    return Cut(by, column, (numbers[0], numbers[1]))


def _hashed(text: str) -> dict[str, int]:
    sizes = {}
    for entry in names(text, "--hash"):
        name, _, size = entry.rpartition(":")
        if not name or not size.isdecimal() or not 2 <= int(size) <= 2**31:
            raise ValueError(f"--hash '{entry}' must name a column and a number of ids from 2 to 2**31: item:1000000")
        sizes[name] = int(size)
    return sizes
