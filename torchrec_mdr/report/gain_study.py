"""The study of when adapters pay: its data sets, its picture and its table (docs/when_it_pays.md)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from torchrec_mdr.data.datasets.synthetic import Synthetic
from torchrec_mdr.storage import open_write

SEEDS = 3  # of the grid
BLIND = "-blind"  # ends the names of data sets whose backbone does not see the domain


@dataclass(frozen=True)
class Point:
    """One data set of the study.

    Args:
        domains (int): number of domains, of equal size.
        rows (int): of a domain, over all splits.
        scale (float): how far domains differ: standard deviation of their own part of the logit, the shared part's
            being 1.
    """

    domains: int = 30
    rows: int = 300
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder.

        Example::

            >>> Point(scale=0.5).name
            'd30-n300-s0.5'
        """
        return f"d{self.domains}-n{self.rows}-s{self.scale:g}"

    def dataset(self) -> Synthetic:
        """How it is made; the second division does nothing."""
        return Synthetic(
            rows=self.domains * self.rows,
            num_domains=self.domains,
            num_auxiliary_domains=1,
            skew=0.0,
            domain_scale=self.scale,
            auxiliary_scale=0.0,
        )

    def blind_dataset(self) -> Synthetic:
        """The same rows, with a backbone that does not see the domain."""
        return replace(self.dataset(), domain_features=False)


MIDDLE = Point()
BY_DOMAINS = tuple(Point(domains=number) for number in (3, 30, 200))
BY_ROWS = tuple(Point(rows=number) for number in (30, 300, 1000))
BY_SCALE = tuple(Point(scale=scale) for scale in (0.0, 1.0, 2.0))
POINTS = tuple(dict.fromkeys((*BY_DOMAINS, *BY_ROWS, *BY_SCALE)))
RANKS = (1, 4, 16)  # of adapters, in the middle

# series and their colours: what each adds to a backbone that does not see the domain
_SERIES = {"domain as a feature": "0.55", "mlora": "tab:blue", "star": "tab:orange"}


@dataclass(frozen=True)
class Gains:
    """Differences in test AUC, one a seed.

    Args:
        values (tuple[float, ...]): at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)

    def text(self) -> str:
        """Mean, and lowest to highest.

        Example::

            >>> Gains((0.01, 0.03)).text()
            '+.020 (+.010 to +.030), 2 of 3 seeds'
        """
        mean, low, high = (f"{value:+.3f}".replace("0.", ".") for value in (self.mean, *self.ends()))
        few = "" if len(self.values) >= SEEDS else f", {len(self.values)} of {SEEDS} seeds"
        return f"{mean} ({low} to {high}){few}"

    def ends(self) -> tuple[float, float]:
        """Lowest and highest."""
        return min(self.values), max(self.values)


def gains(runs: pl.DataFrame, point: Point) -> dict[str, Gains]:
    """What the domain as a feature, and each variant with it, add to a backbone that does not see the domain.

    Args:
        runs (DataFrame): `results.csv` of the comparison.
        point (Point): which data set.
    """
    done = runs.filter(pl.col("status") == "finished")
    own = done.filter(pl.col("dataset") == point.name)
    blind = _by_seed(done.filter(pl.col("dataset") == point.name + BLIND), "auc")
    found = {"domain as a feature": _by_seed(own.filter(pl.col("variant") == "mlora"), "backbone_auc")}
    for (variant,), table in own.group_by(("variant",), maintain_order=True):
        found[str(variant)] = _by_seed(table, "auc")
    return {
        name: Gains(tuple(values[seed] - blind[seed] for seed in values if seed in blind))
        for name, values in found.items()
        if any(seed in blind for seed in values)
    }


def draw(runs: pl.DataFrame, path: str) -> None:
    """Draws gains by number of domains, rows of a domain, how far domains differ, and rank.

    Args:
        runs (DataFrame): `results.csv` of the comparison.
        path (str): SVG or PNG file to write.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey=False).flatten()
    middle = f"{MIDDLE.domains} domains, {MIDDLE.rows} rows each, own part {MIDDLE.scale:g}"
    panels: tuple[tuple[str, Sequence[Point], Callable[[Point], float], bool], ...] = (
        ("number of domains", BY_DOMAINS, lambda point: point.domains, True),
        ("rows of a domain", BY_ROWS, lambda point: point.rows, True),
        ("how far domains differ (own part of the logit, shared 1)", BY_SCALE, lambda point: point.scale, False),
    )
    for axis, (label, points, where, is_log) in zip(axes[:3], panels, strict=True):
        found = [(where(point), gains(runs, point)) for point in points]
        for series, colour in _SERIES.items():
            known = [(x, one[series]) for x, one in found if series in one]
            _line(axis, [x for x, _ in known], [one for _, one in known], series, colour)
        _dress(axis, label, is_log)
    ranks = [(rank, gains(runs, MIDDLE).get(f"rank-{rank}")) for rank in RANKS]
    known = [(rank, one) for rank, one in ranks if one is not None]
    _line(axes[3], [rank for rank, _ in known], [one for _, one in known], "mlora", "tab:blue")
    feature = gains(runs, MIDDLE).get("domain as a feature")
    if feature is not None:
        axes[3].axhline(feature.mean, color=_SERIES["domain as a feature"], label="domain as a feature")
    _dress(axes[3], "rank of adapters", True)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Test AUC over a backbone that does not see the domain ({middle}; three seeds)", fontsize=10)
    ending = os.path.splitext(path)[1].removeprefix(".").lower() or "png"
    with open_write(path) as file:
        figure.savefig(file, format=ending, dpi=120, metadata={"Date": None} if ending == "svg" else None)


def gain_table(runs: pl.DataFrame) -> str:
    """The picture's figures, as Markdown: means over seeds, lowest to highest."""
    lines = []
    for point in POINTS:
        found = gains(runs, point)
        cells = [found[series].text() if series in found else "-" for series in _SERIES]
        lines.append([point.domains, point.rows, f"{point.scale:g}", *cells])
    headers = ["domains", "rows of each", "own part", *_SERIES]
    table = tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)
    found = gains(runs, MIDDLE)
    rank_lines = [[rank, found[f"rank-{rank}"].text()] for rank in RANKS if f"rank-{rank}" in found]
    return f"{table}\n\n{tabulate(rank_lines, ['rank', 'mlora'], tablefmt='pipe', disable_numparse=True)}"


def _line(axis: Axes, x: Sequence[float], found: Sequence[Gains], label: str, colour: str) -> None:
    axis.plot(x, [one.mean for one in found], "o-", color=colour, label=label, markersize=4)
    low, high = ([one.ends()[side] for one in found] for side in (0, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _dress(axis: Axes, label: str, is_log: bool) -> None:
    if is_log:
        axis.set_xscale("log")
    axis.axhline(0.0, color="0.8", linewidth=0.8)
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel("gain in AUC", fontsize=9)
    axis.tick_params(labelsize=8)


def _by_seed(runs: pl.DataFrame, figure: str) -> dict[int, float]:
    known = runs.drop_nulls(figure)
    return dict(zip(known["seed"].to_list(), known[figure].to_list(), strict=True))
