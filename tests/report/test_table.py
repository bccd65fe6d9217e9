from __future__ import annotations

from typing import Any

from torchrec_mdr.report.tables import domain_table, parameter_table


def results(auc: dict[str, float | None], rows: dict[str, int]) -> dict[str, Any]:
    domains = {name: {"auc": value, "logloss": 0.5, "rows": rows[name]} for name, value in auc.items()}
    return {"auc": 0.75, "wauc": 0.5, "logloss": 0.25, "rows": sum(rows.values()), "domains": domains}


def cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_differences_and_missing_values() -> None:
    rows = {"F": 1200, "M": 30, "X": 0}
    table = domain_table(
        results({"F": 0.8, "M": None, "X": 0.69999}, rows), results({"F": 0.75, "M": 0.5, "X": 0.7}, rows)
    )
    assert ["F", "0.7500", "0.8000", "+0.0500", "-", "-", "1,200"] in cells(table)
    assert ["M", "0.5000", "-", "-", "-", "-", "30"] in cells(table)
    assert ["X", "0.7000", "0.7000", "+0.0000", "-", "-", "0"] in cells(table)
    assert ["WAUC", "0.5000", "0.5000", "+0.0000", "1,230"] in cells(table)


def test_without_backbone_nothing_is_compared() -> None:
    table = domain_table(results({"F": 0.8}, {"F": 12}))
    assert ["AUC", "NE", "calibration", "rows"] in cells(table)
    assert ["F", "0.8000", "-", "-", "12"] in cells(table)
    assert "difference" not in table


def test_the_largest_come_first() -> None:
    table = domain_table(results({"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 3, "b": 70, "c": 12}))
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["b", "c", "a"]


def test_of_many_domains_only_those_that_are_told_apart_are_named() -> None:
    """41 domains of which 20 are shown anyway; of the others two gained and one lost beyond chance."""
    names = [f"domain{i}" for i in range(41)]
    rows = {name: 1000 - i for i, name in enumerate(names)}
    gains = {name: {"difference": 0.3, "low": -0.1, "high": 0.7, "p": 0.2} for name in names}
    gains["domain40"] = {"difference": 0.01, "low": 0.005, "high": 0.015, "p": 1e-5}
    gains["domain25"] = {"difference": 0.02, "low": 0.01, "high": 0.03, "p": 1e-6}
    gains["domain33"] = {"difference": -0.02, "low": -0.03, "high": -0.01, "p": 1e-6}
    gains["domain36"] = {"difference": 0.5, "low": None, "high": None, "p": None}  # of a few rows
    same = results({name: 0.5 for name in names}, rows)
    lines = domain_table(same, same, {"domains": gains}).splitlines()
    at = {title: next(i for i, line in enumerate(lines) if line.startswith(title)) for title in ("lost", "gained")}
    assert [line.split()[0] for line in lines[3 : at["lost"]]] == names[:20]
    assert [line.split()[0] for line in lines[at["lost"] + 1 : at["gained"]]] == ["domain33"]
    assert [line.split()[0] for line in lines[at["gained"] + 1 :][:2]] == ["domain25", "domain40"]
    assert "metrics.json" in lines[-2]
    assert lines[-1] == "Of 41 domains 2 gained and 1 lost; 38 cannot be told apart from no change."


def test_none_is_named_where_none_can_be_told_apart() -> None:
    names = [f"domain{i}" for i in range(60)]
    gains = {name: {"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04} for name in names[:3]}
    gains |= {name: {"difference": 0.1, "low": -0.1, "high": 0.3, "p": 0.5} for name in names[3:]}
    same = results({name: 0.5 for name in names}, {name: 9 for name in names})
    assert "for sure" not in domain_table(same, same, {"domains": gains})


def test_rows_with_weights_have_no_intervals_to_tell_domains_apart() -> None:
    same = results({"a": 0.5, "b": 0.5}, {"a": 9, "b": 8})
    gains = {name: {"difference": 0.1, "low": None, "high": None, "p": None} for name in "ab"}
    assert "No domain has an interval, as rows have weights" in domain_table(same, same, {"domains": gains})
    alike = {name: {"difference": 0.0, "low": 0.0, "high": 0.0, "p": None} for name in "ab"}
    said = domain_table(same, same, {"domains": alike})
    assert "Of 2 domains 0 gained and 0 lost; 2 cannot be told apart from no change." in said


def test_forty_domains_are_all_shown() -> None:
    names = [f"domain{i}" for i in range(40)]
    table = domain_table(results({name: 0.5 for name in names}, {name: 1 for name in names}))
    assert [line.split()[0] for line in table.splitlines() if line.startswith("domain")] == names


def test_numeric_domain_names_stay_as_they_are() -> None:
    assert ["007", "0.5000", "-", "-", "1"] in cells(domain_table(results({"007": 0.5}, {"007": 1})))


def test_names_with_odd_characters_stay_on_their_line() -> None:
    names = ["\001", "a\nb", "\x1b[31mred", "ö ✓", "$1_to_$5", "|", "\u200b", "\ud800"]
    lines = domain_table(results(dict.fromkeys(names, 0.5), dict.fromkeys(names, 1))).splitlines()
    shown = [line[: line.index("0.5000")].strip() for line in lines[2 : 2 + len(names)]]
    assert shown == ["\\x01", "a\\nb", "\\x1b[31mred", "ö ✓", "$1_to_$5", "|", "\\u200b", "\\ud800"]
    assert len(lines) == 2 + len(names) + 1 + 3


def test_parameters_relative_to_the_backbone() -> None:
    table = cells(parameter_table({"embeddings": 0, "backbone": 2000, "adapters": 150, "gate": 1}))
    assert ["backbone", "2,000", "100.00%"] in table
    assert ["adapters", "150", "7.50%"] in table
