"""Amazon 5-core of 2018, by default its five smallest categories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torchrec_mdr.data.datasets.amazon import Amazon
from torchrec_mdr.data.datasets.base import Choice, paper_defaults, stage_defaults

SMALLEST = ("AMAZON_FASHION", "All_Beauty", "Appliances", "Gift_Cards", "Magazine_Subscriptions")

# chosen for the five smallest categories by examples/amazon_2018_search.yaml, on validation rows, two to three seeds
_SIZES = {"embeddings.dim": 8, "batch_size": 512, "backbone_options.hidden": [64, 32], "backbone_options.dropout": 0.3}
_WHOLE = {"epochs": 30, "patience": 5, "embedding_l2": 0.1}
_ADAPTERS = {"epochs": 10, "patience": 3, "learning_rate": 1e-4}


@dataclass(frozen=True)
class Amazon2018(Amazon):
    """Reviews by category; a protocol of this project, no paper's.

    Features are user, item and domain; label rating >= 4. By time: the first 80 % of the reviews train, the next 10 %
    validate, the last test. Divisions: category, and activity: whether the user has more than five reviews among the
    training rows. Of the five smallest categories' 16,069 reviews 3,349 are duplicates; 12,720 remain, nine in ten of
    them positive.

    Args:
        data_dir (str): folder of the categories' files, such as All_Beauty_5.json.gz.
        categories (list[str]): categories, as in their files' names.

    Raises:
        ValueError: fewer than two categories, or one that is named twice.
    """

    categories: list[str] = field(default_factory=lambda: list(SMALLEST))

    NAME: ClassVar[str] = "amazon-2018"
    origin: ClassVar[str] = "https://nijianmo.github.io/amazon/ (5-core)"

    def __post_init__(self) -> None:
        if len(set(self.categories)) != len(self.categories) or len(self.categories) < 2:
            raise ValueError(
                f"{self.NAME} needs two or more different categories, not {', '.join(self.categories) or 'none'}"
            )

    @property
    def stems(self) -> list[str]:
        """The categories, as in their files' names."""
        return self.categories

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`; `recommended` is this project's own, chosen on validation rows."""
        if choice.recipe == "paper":
            return paper_defaults(choice.paper)
        values = _SIZES | stage_defaults(_WHOLE, ("pretrain", "joint"))
        return values | stage_defaults(_ADAPTERS, ("adapt", "fuse")) | stage_defaults({"epochs": 10}, ("gate",))

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        self._write_by_time(folder, ">= 4", None, active=5)
