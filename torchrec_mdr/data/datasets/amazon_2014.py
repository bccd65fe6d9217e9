"""Amazon 5-core of 2014: clothing, beauty and health."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any, ClassVar

from torchrec_mdr.data.datasets.amazon import Amazon, seconds
from torchrec_mdr.data.datasets.base import Choice
from torchrec_mdr.data.datasets.published import published_defaults

_SIZES = {
    "multilora": {
        "backbone_options.hidden": [1024, 512, 256, 64],
        "method_options.rank": [16, 16, 8, 8],
    }
}


@dataclass(frozen=True)
class Amazon2014(Amazon):
    """Reviews of three categories, in the protocol of MultiLoRA (section 4.1).

    Features are user, item and domain; label rating > 3. Reviews before 1 March 2014 train, those to 30 April 2014
    validate, later ones test. Divisions: category, and activity: whether the user has more than ten reviews, counted
    among the training rows. 823,534 reviews: 278,677, 198,502 and 346,355, by 39,387, 22,363 and 38,609 users. The
    paper reports a total AUC of .6243 for Mix, .6198 for SingleLoRA and .6429 for MultiLoRA (Table 3; log loss .4772,
    .4948, .4771).

    Args:
        data_dir (str): folder of reviews_Clothing_Shoes_and_Jewelry_5.json.gz, reviews_Beauty_5.json.gz and
            reviews_Health_and_Personal_Care_5.json.gz.
    """

    NAME: ClassVar[str] = "amazon-2014"
    PREFIX: ClassVar[str] = "reviews_"
    origin: ClassVar[str] = "https://jmcauley.ucsd.edu/data/amazon/ (5-core)"

    @property
    def stems(self) -> tuple[str, ...]:
        """The categories, as in their files' names."""
        return "Clothing_Shoes_and_Jewelry", "Beauty", "Health_and_Personal_Care"

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: the paper's Table 2; nothing was chosen here."""
        return published_defaults(choice, _SIZES)

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        cuts = seconds(date(2014, 3, 1)), seconds(date(2014, 5, 1))
        self._write_by_time(folder, "> 3", cuts, active=10)
