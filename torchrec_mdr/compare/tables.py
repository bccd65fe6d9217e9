"""The tables of a comparison, as text, and its report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from torchrec_mdr.compare.figures import MOST_DOMAINS, Comparison, DomainGain, Group, Spread

MOST_COLUMNS = 6  # domains; more of them get a table of their own, and more groups go down


@dataclass(frozen=True)
class Table:
    """A table, as text.

    Args:
        title (str): above it.
        headers (Sequence[str]): of the columns; the first column is a name.
        lines (Sequence[Sequence[str]]): its cells.
        note (str): below it.
    """

    title: str
    headers: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""


def overview_tables(groups: Sequence[Group]) -> list[Table]:
    """Variants down, groups across, or groups down where they are more, for AUC and WAUC; none for a single group."""
    if len(groups) < 2:
        return []
    names = list(dict.fromkeys(row.name for group in groups for row in group.rows))
    one_dataset = len({group.dataset for group in groups}) == 1
    columns = [f"{g.division}, {g.backbone}" if one_dataset else g.name for g in groups]
    tables = []
    for title, figure in (("Total AUC", "auc"), ("WAUC", "wauc")):
        found = [{row.name: spread_text(getattr(row, figure)) for row in group.rows} for group in groups]
        if len(groups) > max(MOST_COLUMNS, len(names)):
            lines = [
                [column, *(rows.get(name, "") for name in names)] for column, rows in zip(columns, found, strict=True)
            ]
            tables.append(Table(title, ["", *names], lines))
        else:
            lines = [[name, *(rows.get(name, "") for rows in found)] for name in names]
            tables.append(Table(title, ["", *columns], lines))
    return tables


def group_tables(group: Group) -> list[Table]:
    """The tables of a group: quality, domains where there are many, significance, published figures, cost."""
    few = len(group.domains) <= MOST_COLUMNS
    shown = list(group.domains) if few else []
    headers = ["", *shown, "total AUC", "WAUC", "log loss", "NE", "calibration", "Δ AUC", "Δ WAUC", "seeds"]
    lines = [
        [
            row.name,
            *(spread_text(domain) for domain in (row.domains if few and row.domains else [None] * len(shown))),
            *(spread_text(figure) for figure in (row.auc, row.wauc, row.logloss, row.ne, row.calibration)),
            *(spread_text(figure, "+.4f") for figure in (row.gain, row.wauc_gain)),
            row.state,
        ]
        for row in group.rows
    ]
    note = "Test rows; mean ± standard deviation over seeds. Δ: less the backbone that the run started from."
    tables = [Table("Quality", headers, lines, note)]
    if not few:
        tables.append(_many_domains(group))
    return [*tables, *_domain_gains(group), _significance(group), *_published(group), _cost(group)]


def markdown(comparison: Comparison) -> str:
    """The whole comparison, without pictures."""
    parts = [f"# {comparison.title}", comparison.progress, *(f"- {remark}" for remark in comparison.remarks)]
    for table in overview_tables(comparison.groups):
        parts += _markdown_table(table)
    for group in comparison.groups:
        parts.append(f"## {group.name}")
        for table in group_tables(group):
            parts += _markdown_table(table)
    facts = "\n".join(f"- {name}: {value}" for name, value in comparison.facts)
    parts += ["## How this was made", facts, f"```yaml\n{comparison.grid.rstrip()}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread_text(spread: Spread | None, form: str = ".4f") -> str:
    """A figure over seeds.

    Example::

        >>> spread_text(Spread(0.81464, 0.00051)), spread_text(Spread(0.5, None)), spread_text(None)
        ('0.8146 ± 0.0005', '0.5000', '-')
    """
    if spread is None:
        return "-"
    mean = format(spread.mean, form)
    return mean if spread.std is None else f"{mean} ± {format(spread.std, form.removeprefix('+'))}"


def _many_domains(group: Group) -> Table:
    rows = [row for row in group.rows if row.domains]
    lines = [
        [group.domains[d], f"{group.domain_rows[d]:,}", *(spread_text(row.domains[d]) for row in rows)]
        for d in group.largest_domains()
    ]
    note = f"The {MOST_DOMAINS} largest of {len(group.domains)} domains; domains.csv has all of them."
    headers = ["domain", "test rows", *(row.name for row in rows)]
    return Table("AUC by domain", headers, lines, note if len(group.domains) > MOST_DOMAINS else "")


def _domain_gains(group: Group) -> list[Table]:
    rows = [row for row in group.rows if any(gain is not None for gain in row.domain_gains)]
    if not rows:
        return []
    shown = group.largest_domains()
    lines = [
        [group.domains[d], f"{group.domain_rows[d]:,}", *(_gain_text(row.domain_gains[d]) for row in rows)]
        for d in shown
    ]
    sure = []
    for row in rows:
        known = [gain for gain in row.domain_gains if gain is not None]
        gained = sum(gain.is_sure and gain.mean > 0 for gain in known)
        lost = sum(gain.is_sure and gain.mean < 0 for gain in known)
        sure.append(f"{row.name}: {gained} of {len(known)} domains gained for sure, {lost} lost")
    note = (
        "Mean over seeds, and the 95 % intervals (DeLong) of all seeds together: what other test rows would change. "
        "Domains stand in the order of their rows; those whose interval holds 0 cannot be told apart. "
        f"{'; '.join(sure)}."
    )
    headers = ["domain", "test rows", *(row.name for row in rows)]
    return [Table("Gain over the backbone by domain", headers, lines, note)]


def _gain_text(gain: DomainGain | None) -> str:
    if gain is None:
        return "-"
    if gain.low is None or gain.high is None:
        return f"{gain.mean:+.4f}"
    return f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"


def _cost(group: Group) -> Table:
    lines = [
        [
            row.name,
            "-" if row.trained is None else f"{row.trained:,}",
            "-" if row.share is None else f"{row.share:.2%}",
            "-" if row.speed is None else f"{row.speed.mean:,.0f}",
            "-" if row.seconds is None else f"{row.seconds.mean:,.0f}",
        ]
        for row in group.rows
    ]
    note = (
        "Parameters trained beside the pretraining; methods without one train everything, embeddings included. The "
        "share is of the pretrained backbone without its embeddings. Samples a second are of training alone, in the "
        "last stage that was timed; seconds are those of all stages, a shared pretraining counted for every run."
    )
    return Table("Cost", ["", "trained", "of the interaction part", "samples/s", "seconds"], lines, note)


def _significance(group: Group) -> Table:
    lines = []
    for row in group.rows:
        if row.is_backbone:
            continue
        line = [row.name, spread_text(row.validation)]
        against = row.against
        if row.name == group.baseline:
            line += ["best baseline", "", "", ""]
        elif against is None:
            line += ["-"] * 4
        else:
            has_interval = against.low is not None and against.high is not None
            line.append(f"{against.mean:+.4f}")
            line.append(f"{against.low:+.4f} to {against.high:+.4f}" if has_interval else "-")
            line.append("-" if against.p is None else f"{against.p:.3f}" if against.p >= 0.001 else "< 0.001")
            line.append(f"{against.wins} of {against.seeds}")
        lines.append(line)
    if group.baseline is None:
        note = "No baseline has finished here."
    else:
        note = (
            f"The best baseline, {group.baseline}, is chosen by its mean validation AUC. Differences are in total test "
            "AUC, seed by seed; interval and p value of the paired t test, two-sided, not corrected for their number."
        )
    headers = ["", "validation AUC", "less best baseline", "95 % interval", "p", "seeds ahead"]
    return Table("Against the best baseline", headers, lines, note)


def _published(group: Group) -> list[Table]:
    rows = [row for row in group.rows if any(figure is not None for figure in row.published)]
    if not rows:
        return []
    used = [n for n in range(len(group.labels)) if any(row.published[n] is not None for row in rows)]
    lines = []
    for row in rows:
        figures = [row.published[n] for n in used]
        cells = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        lines.append([row.name, spread_text(row.auc), spread_text(row.wauc), *cells])
    headers = ["", "ours, total AUC", "ours, WAUC", *(group.labels[n] for n in used)]
    return [Table("Published figures", headers, lines, "As the grid file gives them.")]


def _markdown_table(table: Table) -> list[str]:
    def clean(line: Sequence[str]) -> list[str]:
        return [" ".join(cell.replace("|", "\\|").split()) for cell in line]

    align = ["left", *["right"] * (len(table.headers) - 1)]
    lines = [clean(line) for line in table.lines]
    text = tabulate(lines, clean(table.headers), tablefmt="pipe", disable_numparse=True, colalign=align)
    return [f"**{table.title}**", text, table.note]
