"""Pictures of a comparison, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

# figures without pyplot, which would choose the backend of the whole process
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from torchrec_mdr.compare.figures import Group, Spread, VariantRow
from torchrec_mdr.compare.tables import MOST_COLUMNS

WIDTH = 9.2  # inches
DPI = 150
MOST_VARIANTS = 6  # where every domain is a line of its own
MARKERS = "osD^vPX"


# reports are rewritten after every run, and most groups stay as they were
@lru_cache(maxsize=256)
def draw_domains(group: Group) -> bytes | None:
    """AUC by domain, mean and standard deviation over seeds; None where nothing has finished.

    Few domains get a panel each, the variants down. Where there are many, domains go down, the largest first, and only
    the variants best on validation are drawn.
    """
    rows = [row for row in group.rows if row.auc is not None and row.domains]
    if not rows:
        return None
    return _panels(group, rows) if len(group.domains) <= MOST_COLUMNS else _lines(group, rows)


@lru_cache(maxsize=256)
def draw_cost(group: Group) -> bytes | None:
    """Total AUC against trained parameters, a number for each variant; None where fewer than two have finished."""
    rows = [row for row in group.rows if row.auc is not None and row.trained]
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(WIDTH, max(3.4, 0.21 * len(rows) + 0.9)), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        assert row.auc is not None and row.trained is not None
        axis.errorbar(row.trained, row.auc.mean, yerr=row.auc.std, fmt="o", ms=5, color="tab:blue", elinewidth=0.8)
    backbones = [row.auc for row in group.rows if row.is_backbone and row.auc is not None]
    if len(backbones) == 1:
        axis.axhline(backbones[0].mean, color="gray", linestyle="--", linewidth=1)
    sizes = [row.trained for row in rows if row.trained]
    if max(sizes) >= 10 * min(sizes):
        axis.set_xscale("log")
    else:  # where a logarithmic axis would write its labels over each other
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.margins(0.12)
    axis.set_xlabel("trained parameters beside the pretraining")
    axis.set_ylabel("total test AUC")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)
    names = [f"{number}  {row.name}" for number, row in enumerate(rows, 1)]
    names += ["- -  backbone alone"] if len(backbones) == 1 else []
    axis.annotate("\n".join(names), (1.02, 1.0), xycoords="axes fraction", va="top", fontsize=9, linespacing=1.4)
    figure.draw_without_rendering()  # fixes the layout, so that numbers can be put where there is room
    _put_numbers(axis, [(row.trained, row.auc) for row in rows if row.trained and row.auc])
    return _png(figure)


def _panels(group: Group, rows: Sequence[VariantRow]) -> bytes:
    titles = [*group.domains, "total"]
    figure = Figure(figsize=(WIDTH, 0.27 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)
    for number, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        for position, row in enumerate(rows):
            spread = row.auc if title == "total" and number == len(group.domains) else row.domains[number]
            _dot(axis, spread, position, "gray" if row.is_backbone else "tab:blue", "o")
        axis.set_title(title, fontsize=9, parse_math=False)  # names are texts, whatever $ is in them
        axis.grid(axis="both", alpha=0.3)
        axis.tick_params(axis="x", labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.ticklabel_format(axis="x", useOffset=False)
    axes[0][0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("test AUC", fontsize=9)
    return _png(figure)


def _lines(group: Group, rows: Sequence[VariantRow]) -> bytes:
    backbone = [row for row in rows if row.is_backbone]
    others = [row for row in rows if not row.is_backbone]
    others.sort(key=lambda row: -row.validation.mean if row.validation else 0.0)
    shown = backbone + others[:MOST_VARIANTS]
    domains = group.largest_domains()
    figure = Figure(figsize=(WIDTH, 0.3 * len(domains) + 1.4), layout="constrained")
    axis = figure.subplots()
    for number, row in enumerate(shown):
        shift = 0.6 * ((number + 0.5) / len(shown) - 0.5)
        colour = "gray" if row.is_backbone else f"C{number}"
        for position, domain in enumerate(domains):
            label = row.name if position == 0 else None
            _dot(axis, row.domains[domain], position + shift, colour, MARKERS[number % len(MARKERS)], label)
    axis.set_yticks(range(len(domains)), [group.domains[d] for d in domains], fontsize=8, parse_math=False)
    axis.set_ylim(len(domains) - 0.5, -0.5)
    axis.set_xlabel("test AUC")
    axis.grid(axis="x", alpha=0.3)
    for position in range(len(domains) - 1):
        axis.axhline(position + 0.5, color="lightgray", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return _png(figure)


def _dot(
    axis: Axes, spread: Spread | None, position: float, colour: str, marker: str, label: str | None = None
) -> None:
    if spread is not None:
        axis.errorbar(
            spread.mean, position, xerr=spread.std, fmt=marker, ms=4.5, color=colour, elinewidth=1, label=label
        )


def _put_numbers(axis: Axes, points: Sequence[tuple[float, Spread]]) -> None:
    """Numbers points from 1, each number where it covers no point, bar or other number."""
    pixel = axis.figure.dpi / 72
    places = axis.transData.transform([(x, spread.mean) for x, spread in points])
    ends = axis.transData.transform([(x, spread.mean + (spread.std or 0.0)) for x, spread in points])
    taken = [
        Bbox.from_extents(x - 3 * pixel, 2 * y - top - 3 * pixel, x + 3 * pixel, top + 3 * pixel)
        for (x, y), (_, top) in zip(places, ends, strict=True)
    ]
    rings = [(dx * r, dy * r) for r in (9, 16, 24, 33) for dx, dy in _DIRECTIONS]
    for number, (x, y) in enumerate(places, 1):
        width, height = 7 * len(str(number)) * pixel, 9 * pixel
        boxes = [
            (right, up, Bbox.from_bounds(x + right * pixel - width / 2, y + up * pixel - height / 2, width, height))
            for right, up in rings
        ]
        right, up, box = next((one for one in boxes if not any(one[2].overlaps(old) for old in taken)), boxes[0])
        taken.append(box)
        far = abs(right) + abs(up) > 14
        axis.annotate(
            str(number),
            (points[number - 1][0], points[number - 1][1].mean),
            (right, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "gray", "shrinkA": 0} if far else None,
        )


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
