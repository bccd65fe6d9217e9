"""The tables that a run prints on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

MAX_DOMAINS = 40
NUM_LARGEST = 20
NUM_EXTREME = 10


def domain_table(test: Mapping[str, Any], backbone: Mapping[str, Any] | None = None) -> str:
    """The closing table of a run: AUC per domain, then total, WAUC and log loss.

    With more than 40 domains it shows the 20 largest and, where a backbone is given, the 10 that lost and the 10 that
    gained most of the others.

    Args:
        test (Mapping): `test` of `metrics.json`.
        backbone (Mapping | None): `test_backbone` of `metrics.json`; without one the columns that compare are left out.

    Returns:
        str: the table, without a newline at the end.

    Example::

        >>> backbone = {"auc": 0.79, "wauc": 0.78, "logloss": 0.52, "rows": 3,
        ...             "domains": {"F": {"auc": 0.76, "rows": 1}, "M": {"auc": None, "rows": 2}}}
        >>> test = {"auc": 0.81, "wauc": 0.8, "logloss": 0.5, "rows": 3,
        ...         "domains": {"F": {"auc": 0.8, "rows": 1}, "M": {"auc": None, "rows": 2}}}
        >>> print(domain_table(test, backbone))
                    backbone    adapters    difference    rows
        --------  ----------  ----------  ------------  ------
        F             0.7600      0.8000       +0.0400       1
        M                  -           -             -       2
        --------  ----------  ----------  ------------  ------
        AUC           0.7900      0.8100       +0.0200       3
        WAUC          0.7800      0.8000       +0.0200       3
        log loss      0.5200      0.5000       -0.0200       3
    """
    domains = test["domains"]
    base = backbone["domains"] if backbone else {}
    lines: list[Any] = []
    for title, names in _sections(domains, base):
        if title:
            lines.append([title])
        lines += [_line(name, domains[name], base.get(name), "auc", backbone is not None) for name in names]
    lines.append(SEPARATING_LINE)
    for label, key in (("AUC", "auc"), ("WAUC", "wauc"), ("log loss", "logloss")):
        lines.append(_line(label, test, backbone, key, backbone is not None))
    headers = ["", "backbone", "adapters", "difference", "rows"] if backbone else ["", "AUC", "rows"]
    table = _render(lines, headers)
    if len(domains) > MAX_DOMAINS:
        table += f"\n{len(domains)} domains in all: metrics.json has every one."
    return table


def parameter_table(parameters: Mapping[str, int]) -> str:
    """The number of parameters of each group, absolute and relative to the backbone without its embeddings.

    Args:
        parameters (Mapping[str, int]): `parameters` of `metrics.json`: embeddings, backbone, adapters, gate.

    Returns:
        str: the table, without a newline at the end.

    Example::

        >>> print(parameter_table({"embeddings": 160000, "backbone": 62977, "adapters": 6024, "gate": 0}))
        parameters      number    of the interaction part
        ------------  --------  -------------------------
        embeddings     160,000                    254.06%
        backbone        62,977                    100.00%
        adapters         6,024                      9.57%
        gate                 0                      0.00%
    """
    backbone = parameters["backbone"]
    lines = [[name, f"{n:,}", f"{n / backbone:.2%}" if backbone else "-"] for name, n in parameters.items()]
    return _render(lines, ["parameters", "number", "of the interaction part"])


def stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """What each stage trained and how fast: parameters absolute, relative to the backbone and to its interaction part.

    Args:
        stages (Sequence[Mapping]): `stages` of `metrics.json`.

    Returns:
        str: the table, without a newline at the end.
    """
    lines = [
        [
            stage["name"],
            f"{stage['epochs']}",
            f"{stage['trainable_parameters']:,}",
            f"{stage['share_of_backbone']:.2%}",
            f"{stage['share_of_interaction']:.2%}",
            "-" if stage["samples_per_second"] is None else f"{stage['samples_per_second']:,.0f}",
        ]
        for stage in stages
    ]
    return _render(lines, ["stage", "epochs", "trained", "of the backbone", "of its interaction part", "samples/s"])


def _sections(domains: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    names = list(domains)
    if len(names) <= MAX_DOMAINS:
        return [("", names)]
    names.sort(key=lambda name: -domains[name]["rows"])
    sections = [(f"the {NUM_LARGEST} largest", names[:NUM_LARGEST])]
    differences = {name: _difference(domains[name], base.get(name), "auc") for name in names[NUM_LARGEST:]}
    known = [name for name, difference in differences.items() if difference is not None]
    known.sort(key=lambda name: differences[name] or 0.0)
    extreme = min(NUM_EXTREME, len(known) // 2)
    if extreme:
        sections.append(("lost most", known[:extreme]))
        sections.append(("gained most", known[-extreme:]))
    return sections


def _line(label: str, test: Mapping[str, Any], base: Mapping[str, Any] | None, key: str, compare: bool) -> list[str]:
    line = [_printable(label), _number(test[key]), f"{test['rows']:,}"]
    if compare:
        line[1:1] = [_number(base[key] if base else None)]
        line[3:3] = [_number(_difference(test, base, key), "+z.4f")]
    return line


def _printable(name: str) -> str:
    """A name on one line: what a terminal or the table would act on is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _difference(test: Mapping[str, Any], base: Mapping[str, Any] | None, key: str) -> float | None:
    if base is None or test[key] is None or base[key] is None:
        return None
    return float(test[key] - base[key])


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _render(lines: list[Any], headers: list[str]) -> str:
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
