"""What a comparison of variants has come to: the figures of each group of runs."""

from __future__ import annotations

from dataclasses import dataclass

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
class DomainGain:
    """A domain's gain in test AUC over the backbone that each run started from.

    Args:
        mean (float): over seeds.
        low (float | None): lowest end of the seeds' 95 % intervals; None where a seed has too few rows for one.
        high (float | None): highest end.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def is_sure(self) -> bool:
        """Whether it is told apart from no change, whatever the seed."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


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
        ne (Spread | None): normalised entropy, likewise.
        calibration (Spread | None): likewise.
        domains (tuple[Spread | None, ...]): test AUC by domain, in the group's order.
        domain_gains (tuple[DomainGain | None, ...]): over the backbone, in the group's order.
        gain (Spread | None): in AUC, over the backbone that the run itself started from.
        wauc_gain (Spread | None): in WAUC.
        validation (Spread | None): AUC on validation rows, of the last stage.
        trained (int | None): parameters, of all stages but the pretraining.
        share (float | None): `trained`, of the backbone without embeddings.
        speed (Spread | None): samples a second of training, in the last stage that says so.
        seconds (Spread | None): of all stages, the pretraining included.
        against (Paired | None): the best baseline.
        published (tuple[float | None, ...]): in the order of the group's labels.
        is_backbone (bool): whether this is a pretrained backbone by itself, and no variant.
    """

    name: str
    state: str
    auc: Spread | None = None
    wauc: Spread | None = None
    logloss: Spread | None = None
    ne: Spread | None = None
    calibration: Spread | None = None
    domains: tuple[Spread | None, ...] = ()
    domain_gains: tuple[DomainGain | None, ...] = ()
    gain: Spread | None = None
    wauc_gain: Spread | None = None
    validation: Spread | None = None
    trained: int | None = None
    share: float | None = None
    speed: Spread | None = None
    seconds: Spread | None = None
    against: Paired | None = None
    published: tuple[float | None, ...] = ()
    is_backbone: bool = False


@dataclass(frozen=True)
class Group:
    """The variants on one data set, division and backbone.

    Args:
        dataset (str): its name.
        division (str): the natural one.
        backbone (str): a key of BACKBONES.
        domains (tuple[str, ...]): names, the largest first.
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

    def largest_domains(self) -> range:
        """Positions of the domains that are shown where there are many, largest first."""
        return range(min(len(self.domains), MOST_DOMAINS))


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
