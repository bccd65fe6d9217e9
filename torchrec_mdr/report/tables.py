"""The tables that a run prints on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats
from tabulate import SEPARATING_LINE, tabulate

MAX_DOMAINS = 40
NUM_LARGEST = 20
NUM_SURE = 10
FALSE_DISCOVERIES = 0.05  # share of the domains named as gaining or losing that do not, at most, on average
Gains = Mapping[str, Any]


def domain_table(
    test: Mapping[str, Any], backbone: Mapping[str, Any] | None = None, gain: Mapping[str, Any] | None = None
) -> str:
    """The closing table of a run: AUC, NE and calibration by domain, the largest first, then those of all rows.

    With more than 40 domains it shows the 20 largest and, where a backbone is given, up to 10 each of the others that
    lost or gained for sure, again the largest first: domains whose gains cannot be told apart are not ranked.

    Args:
        test (Mapping): `test` of `metrics.json`.
        backbone (Mapping | None): `test_backbone` of `metrics.json`; without one the columns that compare are left out.
        gain (Mapping | None): `gain` of `metrics.json`.

    Returns:
        str: the table, without a newline at the end.

    Example::

        >>> backbone = {"auc": 0.79, "wauc": 0.78, "logloss": 0.52, "rows": 30, "ne": 0.8, "calibration": 1.01,
        ...             "domains": {"F": {"auc": 0.76, "rows": 1}, "M": {"auc": None, "rows": 29}}}
        >>> test = {"auc": 0.81, "wauc": 0.8, "logloss": 0.5, "rows": 30, "ne": 0.77, "calibration": 0.99,
        ...         "domains": {"F": {"auc": 0.8, "rows": 1, "ne": 0.7, "calibration": 1.1},
        ...                     "M": {"auc": None, "rows": 29, "ne": None, "calibration": None}}}
        >>> gain = {"auc": {"difference": 0.02, "low": 0.011, "high": 0.029, "p": 0.001}}
        >>> print(domain_table(test, backbone, gain))
                       backbone    adapters    difference       95 % interval      NE    calibration    rows
        -----------  ----------  ----------  ------------  ------------------  ------  -------------  ------
        M                     -           -             -                           -              -      29
        F                0.7600      0.8000       +0.0400                      0.7000          1.100       1
        -----------  ----------  ----------  ------------  ------------------  ------  -------------  ------
        AUC              0.7900      0.8100       +0.0200  +0.0110 to +0.0290                             30
        WAUC             0.7800      0.8000       +0.0200                                                 30
        log loss         0.5200      0.5000       -0.0200                                                 30
        NE               0.8000      0.7700       -0.0300                                                 30
        calibration      1.0100      0.9900       -0.0200                                                 30
    """
    domains, gain = test["domains"], gain or {}
    base = backbone["domains"] if backbone else {}
    gains = gain.get("domains", {})
    compare = backbone is not None
    lines: list[Any] = []
    for title, names in _sections(domains, gains if compare else {}):
        if title:
            lines.append([title])
        lines += [_line(name, domains[name], base.get(name), "auc", gains.get(name), compare, True) for name in names]
    lines.append(SEPARATING_LINE)
    for label, key in _TOTALS:
        if key in test:
            lines.append(_line(label, test, backbone, key, gain.get(key), compare, False))
    compared = ["backbone", "adapters", "difference", "95 % interval"] if compare else ["AUC"]
    table = _render(lines, ["", *compared, "NE", "calibration", "rows"])
    notes = [f"{len(domains)} domains in all: metrics.json has every one."] if len(domains) > MAX_DOMAINS else []
    summary = test.get("domains_summary")
    if summary is not None:
        notes = [f"{summary['domains']} domains in all: domains.parquet has every one, metrics.json the largest."]
    elif gains:
        notes.append(_sure_note(gains))
    return "\n".join([table, *(note for note in notes if note)])


_TOTALS = (("AUC", "auc"), ("WAUC", "wauc"), ("log loss", "logloss"), ("NE", "ne"), ("calibration", "calibration"))


def knowing_the_domain(metrics: Mapping[str, Any]) -> str:
    """How much of a run's gain comes from knowing the domain at all; empty where there is no backbone to gain over.

    Args:
        metrics (Mapping): `metrics.json`.

    Example::

        >>> print(knowing_the_domain({"test": {"auc": 0.81}, "test_backbone": {"auc": 0.72}, "domain_feature": None,
        ...     "test_backbone_with_offsets": {"auc": 0.75, "logloss": 0.5}}))
        The backbone does not see the domain. A constant for each domain, fitted on validation rows, adds +0.0300
        to its AUC: that part of +0.0900 is from knowing the domain at all; as a sparse feature it may give more.
    """
    backbone, feature = metrics.get("test_backbone"), metrics.get("domain_feature")
    if backbone is None:
        return ""
    if feature is not None:
        name = _printable(feature)
        return f"The backbone sees the domain (feature '{name}'): the difference is on top of knowing it."
    offsets = metrics.get("test_backbone_with_offsets")
    if offsets is None or backbone["auc"] is None or offsets["auc"] is None:
        return ""
    known = f"{offsets['auc'] - backbone['auc']:+z.4f}"
    return (
        f"The backbone does not see the domain. A constant for each domain, fitted on validation rows, adds {known}\n"
        f"to its AUC: that part of {metrics['test']['auc'] - backbone['auc']:+z.4f} is from knowing the domain at all; "
        "as a sparse feature it may give more."
    )


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


def sure_domains(gains: Gains) -> tuple[list[str], list[str]]:
    """The domains that lost, and those that gained, told apart from no change in spite of their number.

    Args:
        gains (Mapping): of each domain, `difference` and `p`, as in `metrics.json`.

    Returns:
        tuple: names, in the order they come in; of all that are named, one in twenty is no change, on average
            (Benjamini and Hochberg).

    Example::

        >>> sure_domains({"a": {"difference": 0.1, "p": 0.001}, "b": {"difference": -0.1, "p": 0.04}, "c": {"p": None}})
        (['b'], ['a'])
        >>> sure_domains({"a": {"difference": 0.1, "p": 0.001}, "b": {"difference": -0.1, "p": 0.06}})
        ([], ['a'])
    """
    tested = {name: gain for name, gain in gains.items() if gain.get("p") is not None}
    if not tested:
        return [], []
    adjusted = stats.false_discovery_control([gain["p"] for gain in tested.values()])
    sure = [name for name, p in zip(tested, adjusted, strict=True) if p < FALSE_DISCOVERIES]
    return [n for n in sure if tested[n]["difference"] < 0], [n for n in sure if tested[n]["difference"] > 0]


def _sure_note(gains: Gains) -> str:
    if all(gain.get("low") is None for gain in gains.values()):
        return "No domain has an interval, as rows have weights or are too few; which domains gained cannot be told."
    lost, gained = sure_domains(gains)
    rest = len(gains) - len(lost) - len(gained)
    counts = f"{len(gained)} gained and {len(lost)} lost"
    return f"Of {len(gains)} domains {counts}; {rest} cannot be told apart from no change."


def _sections(domains: Mapping[str, Any], gains: Gains) -> list[tuple[str, list[str]]]:
    names = sorted(domains, key=lambda name: -domains[name]["rows"])
    if len(names) <= MAX_DOMAINS:
        return [("", names)]
    sections = [(f"the {NUM_LARGEST} largest", names[:NUM_LARGEST])]
    for title, sure in zip(("lost for sure", "gained for sure"), sure_domains(gains), strict=True):
        others = [name for name in names[NUM_LARGEST:] if name in set(sure)]
        if others:
            sections.append((title if len(others) <= NUM_SURE else f"{title}, the largest", others[:NUM_SURE]))
    return sections


def _line(
    label: str,
    test: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    key: str,
    gain: Mapping[str, Any] | None,
    compare: bool,
    is_domain: bool,
) -> list[str]:
    line = [_printable(label), _number(test[key])]
    if compare:
        line.insert(1, _number(base.get(key) if base else None))
        line += [_number(_difference(test, base, key), "+z.4f"), interval_text(gain)]
    own = [_number(test.get("ne")), _number(test.get("calibration"), ".3f")] if is_domain else ["", ""]
    return [*line, *own, f"{test['rows']:,}"]


def interval_text(gain: Mapping[str, Any] | None) -> str:
    """A gain's interval; empty where it has none.

    Example::

        >>> interval_text({"low": -0.00004, "high": 0.01})
        '+0.0000 to +0.0100'
    """
    if gain is None or gain.get("low") is None:
        return ""
    return f"{gain['low']:+z.4f} to {gain['high']:+z.4f}"


def _printable(name: str) -> str:
    """A name on one line: what a terminal or the table would act on is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _difference(test: Mapping[str, Any], base: Mapping[str, Any] | None, key: str) -> float | None:
    if base is None or test[key] is None or base.get(key) is None:
        return None
    return float(test[key] - base[key])


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _render(lines: list[Any], headers: list[str]) -> str:
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
