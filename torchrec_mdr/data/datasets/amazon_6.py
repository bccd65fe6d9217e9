"""Amazon-6: six categories of Amazon 2018 with sampled negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torchrec_mdr.data.datasets.amazon import RAW_NAMES, Amazon
from torchrec_mdr.data.datasets.base import Choice
from torchrec_mdr.data.datasets.negatives import sampled_rows
from torchrec_mdr.data.datasets.published import published_defaults


@dataclass(frozen=True)
class Amazon6(Amazon):
    """Reviews of six categories as clicks, in the protocol of MLoRA, which takes it from MAMDR.

    Every review is a positive row, whatever its rating; negatives are sampled, see `sampled_rows`. Features are user,
    item and domain; 60/20/20 within each domain and label. The domains are those of MAMDR's `config_6.json`. Settings
    of recipe `paper` are those of MLoRA's `config/Amazon_6/mlora.json`. One division alone: methods for several do
    not run on it.

    Args:
        data_dir (str): folder of Musical_Instruments_5.json.gz, Office_Products_5.json.gz,
            Patio_Lawn_and_Garden_5.json.gz, Prime_Pantry_5.json.gz, Toys_and_Games_5.json.gz and
            Video_Games_5.json.gz.
    """

    NAME: ClassVar[str] = "amazon-6"
    origin: ClassVar[str] = "https://nijianmo.github.io/amazon/ (5-core)"

    @property
    def stems(self) -> tuple[str, ...]:
        """The categories, as in their files' names."""
        return (
            "Musical_Instruments",
            "Office_Products",
            "Patio_Lawn_and_Garden",
            "Prime_Pantry",
            "Toys_and_Games",
            "Video_Games",
        )

    @classmethod
    def default_divisions(cls, protocol: str | None) -> tuple[str, ...]:
        """See `Dataset.default_divisions`."""
        return ("category",)

    @classmethod
    def defaults(cls, choice: Choice) -> dict[str, Any]:
        """See `Dataset.defaults`: MLoRA's settings; nothing was chosen here."""
        return published_defaults(choice, {})

    def write(self, folder: str) -> None:
        """See `Dataset.write`."""
        reviews, dropped = self._reviews()
        clicks = reviews.unique(("user", "item", "category"), maintain_order=True)
        dropped += reviews.height - clicks.height
        sampled_rows(clicks, "category", self.stems, {"duplicates_dropped": dropped}, RAW_NAMES).write(
            folder, self.NAME
        )
