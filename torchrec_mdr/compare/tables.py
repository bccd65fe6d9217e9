"""What a comparison of variants shows: the figures of each group of runs, and the tables that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

MOST_COLUMNS = 6  # domains; more of them get a table of their own, and more groups go down
MOST_DOMAINS = 40  # in a table or picture; all of them are in domains.csv
BACKBONE_ROW = "backbone"  # what the pretrained one by itself is called


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Args:
        mean (float): over seeds.
        std (float | None): with n - 1; None for a single seed.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class Paired:
    """A variant against the best baseline, seed by seed.

    Args:
        mean (float): of the differences in total test AUC, variant less baseline.
        low (float | None): end of the 95 % confidence interval by paired t; None for a single seed.
        high (float | None): its other end.
        p (float | None): two-sided p value of the paired t test; None where there is none.
        wins (int): seeds where the variant is ahead.
        seeds (int): that both have.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    wins: int
    seeds: int


@dataclass(frozen=True)
class VariantRow:
    """One variant in a group; figures are None where nothing has finished, or where there is no such figure.

    Args:
        name (str): of the variant, or `BACKBONE_ROW` for the pretrained backbone by itself; `BACKBONE_ROW of NAMES`
            where variants start from several.
        state (str): how many seeds are there, or why there is none.
        auc (Spread | None): on test rows.
        wauc (Spread | None): likewise.
        logloss (Spread | None): likewise.
        domains (tuple[Spread | None, ...]): test AUC by domain, in the group's order.
        gain (Spread | None): in AUC, over the backbone that the run itself started from.
        wauc_gain (Spread | None): in WAUC.
        validation (Spread | None): AUC on validation rows, of the last stage.
        trained (int | None): parameters, of all stages but the pretraining.
        share (float | None): `trained`, of the backbone without embeddings.
        speed (Spread | None): samples a second of training, in the last stage that says so.
        seconds (Spread | None): of all stages, the pretraining included.
        against (Paired | None): the best baseline.
        published (tuple[float | None, ...]): in the order of the group's labels.
    """

    name: str
    state: str
    auc: Spread | None = None
    wauc: Spread | None = None
    logloss: Spread | None = None
    domains: tuple[Spread | None, ...] = ()
    gain: Spread | None = None
    wauc_gain: Spread | None = None
    validation: Spread | None = None
    trained: int | None = None
    share: float | None = None
    speed: Spread | None = None
    seconds: Spread | None = None
    against: Paired | None = None
    published: tuple[float | None, ...] = ()

    @property
    def is_backbone(self) -> bool:
        """Whether this is a pretrained backbone and no variant, in whose name there is no space."""
        return self.name.split(" ")[0] == BACKBONE_ROW


@dataclass(frozen=True)
class Group:
    """The variants on one data set, division and backbone.

    Args:
        dataset (str): its name.
        division (str): the natural one.
        backbone (str): a key of BACKBONES.
        domains (tuple[str, ...]): names, in the order of their ids.
        domain_rows (tuple[int, ...]): test rows.
        rows (tuple[VariantRow, ...]): the backbone alone first, where it is known.
        baseline (str | None): the best baseline, by mean validation AUC.
        labels (tuple[str, ...]): of published figures.
    """

    dataset: str
    division: str
    backbone: str
    domains: tuple[str, ...]
    domain_rows: tuple[int, ...]
    rows: tuple[VariantRow, ...]
    baseline: str | None
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.dataset}, {self.division}, {self.backbone}"

    def largest_domains(self) -> list[int]:
        """Positions of the domains that are shown where there are many, largest first."""
        order = sorted(range(len(self.domains)), key=lambda position: -self.domain_rows[position])
        return order[:MOST_DOMAINS]


@dataclass(frozen=True)
class Comparison:
    """All that a report shows.

    Args:
        title (str): of the report.
        progress (str): how many runs have finished.
        groups (tuple[Group, ...]): in the grid's order.
        remarks (tuple[str, ...]): what a reader has to know of the figures.
        facts (tuple[tuple[str, str], ...]): how this was made, as names and values.
        grid (str): the grid file.
    """

    title: str
    progress: str
    groups: tuple[Group, ...]
    remarks: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    grid: str


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
    headers = ["", *shown, "total AUC", "WAUC", "log loss", "Δ AUC", "Δ WAUC", "seeds"]
    lines = [
        [
            row.name,
            *(spread_text(domain) for domain in (row.domains if few and row.domains else [None] * len(shown))),
            *(spread_text(figure) for figure in (row.auc, row.wauc, row.logloss)),
            *(spread_text(figure, "+.4f") for figure in (row.gain, row.wauc_gain)),
            row.state,
        ]
        for row in group.rows
    ]
    note = "Test rows; mean ± standard deviation over seeds. Δ: less the backbone that the run started from."
    tables = [Table("Quality", headers, lines, note)]
    if not few:
        tables.append(_many_domains(group))
    return [*tables, _significance(group), *_published(group), _cost(group)]


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
