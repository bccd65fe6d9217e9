"""Tables, pictures and the page of a comparison, made of figures by hand."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from torchrec_mdr.compare import plots
from torchrec_mdr.compare.figures import Comparison, DomainGain, Group, Paired, Spread, VariantRow
from torchrec_mdr.compare.page import page
from torchrec_mdr.compare.tables import Table, group_tables, markdown, overview_tables

NASTY = "<img src=x onerror=alert(1)> & \"q\" | 'p'"


def row(name: str, auc: float, domains: int, **more: object) -> VariantRow:
    spread = Spread(auc, 0.001)
    values = VariantRow(name, "2 seeds", *(spread,) * 5, domains=(spread,) * domains, trained=1000, validation=spread)
    return replace(values, published=(None,), **more)  # type: ignore[arg-type]


def group(domains: int = 3, name: str = "mlp") -> Group:
    against = Paired(0.01, -0.002, 0.022, 0.0004, 2, 2)
    rows = (
        row("backbone", 0.79, domains, is_backbone=True),
        row("mix", 0.8, domains),
        row("lora", 0.81, domains, against=against),
    )
    names = tuple(f"domain {n}" for n in range(domains))
    return Group("data", "age", name, names, tuple(range(domains, 0, -1)), rows, "mix", ("paper",))


def table(tables: list[Table], title: str) -> dict[str, dict[str, str]]:
    (found,) = [one for one in tables if one.title == title]
    return {line[0]: dict(zip(found.headers, line, strict=True)) for line in found.lines}


def test_few_domains_are_columns() -> None:
    quality = table(group_tables(group()), "Quality")
    assert quality["lora"]["domain 2"] == quality["lora"]["total AUC"] == "0.8100 ± 0.0010"
    assert quality["mix"]["Δ AUC"] == "-"


def test_many_domains_get_a_table_of_their_own_largest_first() -> None:
    tables = group_tables(group(50))
    assert "domain 1" not in next(one for one in tables if one.title == "Quality").headers
    domains = table(tables, "AUC by domain")
    assert list(domains)[:2] == ["domain 0", "domain 1"] and len(domains) == 40
    assert domains["domain 0"] == {
        "domain": "domain 0",
        "test rows": "50",
        "backbone": "0.7900 ± 0.0010",
        "mix": "0.8000 ± 0.0010",
        "lora": "0.8100 ± 0.0010",
    }


def test_gains_by_domain_say_which_are_told_apart() -> None:
    plain = group(4)
    gains = (DomainGain(0.02, 0.01, 0.03), DomainGain(0.3, -0.1, 0.7), DomainGain(0.4, None, None), None)
    given = replace(plain, rows=(*plain.rows[:2], replace(plain.rows[2], domain_gains=gains)))
    assert "Gain over the backbone by domain" not in [one.title for one in group_tables(plain)]
    (found,) = [one for one in group_tables(given) if one.title == "Gain over the backbone by domain"]
    assert list(found.headers) == ["domain", "test rows", "lora"]
    assert [line[2] for line in found.lines] == [
        "+0.0200 (+0.0100 to +0.0300)",
        "+0.3000 (-0.1000 to +0.7000)",
        "+0.4000",
        "-",
    ]
    assert "lora: 1 of 3 domains gained for sure, 0 lost" in found.note


def test_significance_names_the_baseline_and_leaves_the_backbone_out() -> None:
    lines = table(group_tables(group()), "Against the best baseline")
    assert list(lines) == ["mix", "lora"] and lines["mix"]["less best baseline"] == "best baseline"
    found = lines["lora"]
    assert found["95 % interval"] == "-0.0020 to +0.0220" and found["p"] == "< 0.001"
    assert found["less best baseline"] == "+0.0100" and found["seeds ahead"] == "2 of 2"


def test_published_figures_have_a_table_where_there_are_some() -> None:
    plain = group()
    assert "Published figures" not in [one.title for one in group_tables(plain)]
    given = replace(plain, rows=(*plain.rows[:2], replace(plain.rows[2], published=(0.82,))))
    lines = table(group_tables(given), "Published figures")
    assert list(lines) == ["lora"] and lines["lora"]["paper"] == "0.8200"


def test_an_overview_puts_groups_side_by_side() -> None:
    assert overview_tables([group()]) == []
    auc, wauc = overview_tables([group(name="mlp"), group(name="wdl")])
    assert list(auc.headers) == ["", "age, mlp", "age, wdl"] and (auc.title, wauc.title) == ("Total AUC", "WAUC")
    assert ["lora", "0.8100 ± 0.0010", "0.8100 ± 0.0010"] in auc.lines


def test_an_overview_of_many_groups_is_no_wider_than_a_page() -> None:
    many = [group(name=f"backbone {n}") for n in range(7)]
    last = replace(many[-1], rows=many[-1].rows[:2])
    auc, _ = overview_tables([*many[:-1], last])
    assert list(auc.headers) == ["", "backbone", "mix", "lora"] and len(auc.lines) == 7
    assert list(auc.lines[0]) == ["age, backbone 0", "0.7900 ± 0.0010", "0.8000 ± 0.0010", "0.8100 ± 0.0010"]
    assert auc.lines[6][1:] == ["0.7900 ± 0.0010", "0.8000 ± 0.0010", ""]


def test_a_page_holds_everything_and_escapes_it() -> None:
    nasty = group()
    rows = (*nasty.rows, VariantRow(NASTY, NASTY, published=(0.5,)))
    nasty = replace(nasty, dataset=NASTY, domains=(NASTY, "b", "c"), rows=rows, labels=(NASTY,))
    comparison = Comparison(NASTY, NASTY, (nasty, group(12)), (NASTY,), ((NASTY, NASTY),), NASTY)
    text = page(comparison)
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    sources = re.findall(r'<img src="([^"]{0,22})', text)
    assert sources == ["data:image/png;base64,"] * 4
    assert not re.search(r"<link|<script|@import|url\(|https?://", text)
    assert text.count("<table>") == text.count('<div class="scroll"><table>') > 0
    columns = {
        line.count(" | ") for line in markdown(comparison).splitlines() if line.startswith("| ") and "img" not in line
    }
    assert 0 not in columns


def test_names_in_pictures_are_texts() -> None:
    for domains in (3, 12):
        plain = group(domains)
        names = ("$1_to_$5", "$\\frac$", *plain.domains[2:])
        assert plots.draw_domains(replace(plain, domains=names)) is not None


@pytest.mark.parametrize(("backbones", "lines"), [(1, 1), (2, 0)])
def test_the_one_backbone_is_a_line_in_the_picture_of_cost(
    backbones: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def keep(figure: Figure) -> bytes:
        found.append(sum(line.get_linestyle() == "--" for line in figure.axes[0].lines))
        return b""

    monkeypatch.setattr(plots, "_png", keep)
    plain = group()
    rows = (*[replace(plain.rows[0], trained=None)] * backbones, *plain.rows[1:])
    plots.draw_cost.__wrapped__(replace(plain, rows=rows))
    assert found == [lines]


def test_a_picture_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(group: Group) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr("torchrec_mdr.compare.page.draw_domains", fail)
    text = page(Comparison("t", "1 of 1", (group(),), (), (), ""))
    assert text.count("<img") == 1 and "0.8100 ± 0.0010" in text and "How this was made" in text
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and "no ink" in warning.message and "data, age, mlp" in warning.message


def test_unfinished_groups_have_no_pictures_but_tables() -> None:
    waiting = Group("data", "age", "mlp", (), (), (VariantRow("mix", "waiting"),), None, ())
    assert plots.draw_domains(waiting) is None and plots.draw_cost(waiting) is None
    assert "waiting" in page(Comparison("t", "0 of 1", (waiting,), (), (), ""))


@pytest.mark.parametrize("domains", [1, 6, 7, 45])
def test_pictures_are_drawn_for_any_number_of_domains(domains: int) -> None:
    for picture in (plots.draw_domains(group(domains)), plots.draw_cost(group(domains))):
        assert picture is not None and picture.startswith(b"\x89PNG")


def test_numbers_in_a_picture_do_not_cover_each_other() -> None:
    figure = Figure(figsize=(9, 4))
    axis = figure.subplots()
    points = [(1000.0 * (1 + n % 2), Spread(0.8 + 0.0001 * (n // 2), None)) for n in range(14)]
    points += [(50.0, Spread(0.75, 0.02)), (1e6, Spread(0.85, 0.01))]
    for x, spread in points:
        axis.plot(x, spread.mean, "o")
    axis.set_xscale("log")
    figure.draw_without_rendering()
    plots._put_numbers(axis, points)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [str(n) for n in range(1, 17)]
    # of the digits alone: a line to the point belongs to the extent of an annotation
    digits = [super(type(text), text).get_window_extent() for text in axis.texts]
    assert len(boxes) == 16 and not any(a.overlaps(b) for a, b in itertools.combinations(digits, 2))


@pytest.mark.parametrize("sizes", [(17536, 17554), (1000, 1000), (9000, 15000), (5000, 51000), (40, 10_000_000)])
def test_labels_of_sizes_do_not_cover_each_other(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Text]] = []

    def keep(figure: Figure) -> bytes:
        axis = figure.axes[0].xaxis
        figure.draw_without_rendering()
        labels = axis.get_majorticklabels() + axis.get_minorticklabels()
        found.append([label for label in labels if label.get_text() and label.get_visible()])
        boxes = [label.get_window_extent() for label in found[0]]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        return b""

    monkeypatch.setattr(plots, "_png", keep)
    plain = group()
    rows = [replace(row, trained=size) for row, size in zip(plain.rows[1:], sizes, strict=True)]
    plots.draw_cost.__wrapped__(replace(plain, rows=(replace(plain.rows[0], trained=None), *rows)))
    assert len(found[0]) >= 2
