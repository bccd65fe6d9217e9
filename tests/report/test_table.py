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
    assert ["F", "0.7500", "0.8000", "+0.0500", "1,200"] in cells(table)
    assert ["M", "0.5000", "-", "-", "30"] in cells(table)
    assert ["X", "0.7000", "0.7000", "+0.0000", "0"] in cells(table)
    assert ["WAUC", "0.5000", "0.5000", "+0.0000", "1,230"] in cells(table)


def test_without_backbone_nothing_is_compared() -> None:
    table = domain_table(results({"F": 0.8}, {"F": 12}))
    assert ["AUC", "rows"] in cells(table)
    assert ["F", "0.8000", "12"] in cells(table)
    assert "difference" not in table


def test_many_domains_show_the_largest_and_the_extremes() -> None:
    names = [f"domain{i}" for i in range(41)]
    rows = {name: 1000 - i for i, name in enumerate(names)}
    after: dict[str, float | None] = {name: 0.5 for name in names}
    after |= {"domain30": 0.4, "domain33": 0.7, "domain40": None}
    table = domain_table(results(after, rows), results({name: 0.5 for name in names}, rows))
    lines = table.splitlines()
    at = {title: next(i for i, line in enumerate(lines) if line.startswith(title)) for title in ("lost", "gained")}
    assert [line.split()[0] for line in lines[3 : at["lost"]]] == names[:20]
    assert lines[at["lost"] + 1].split()[0] == "domain30"
    shown = [line.split()[0] for line in lines if line.startswith("domain")]
    assert shown[-1] == "domain33" and len(shown) == len(set(shown)) == 40
    assert "domain40" not in shown
    assert "metrics.json" in lines[-1]


def test_forty_domains_are_all_shown() -> None:
    names = [f"domain{i}" for i in range(40)]
    table = domain_table(results({name: 0.5 for name in names}, {name: 1 for name in names}))
    assert [line.split()[0] for line in table.splitlines() if line.startswith("domain")] == names


def test_numeric_domain_names_stay_as_they_are() -> None:
    assert ["007", "0.5000", "1"] in cells(domain_table(results({"007": 0.5}, {"007": 1})))


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
