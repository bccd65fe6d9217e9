"""What the labels of a prepared data set must hold before training."""

from __future__ import annotations

import logging

from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.schema import SPLITS, Schema

logger = logging.getLogger(__name__)


def check_labels(folder: str, schema: Schema) -> None:
    """Checks before a run that training and validation rows are of both classes; warns where test rows are not.

    Reads the labels of a split until both have been seen.

    Raises:
        ValueError: a split's rows are all of one class, a label is neither 0 nor 1, or see :class:`SplitReader`.
    """
    for split in SPLITS:
        reader = SplitReader(folder, schema, split, [])
        seen: set[float] = set()
        for group in reader.groups:
            seen |= set(reader.labels(group).tolist())
            if len(seen) > 1:
                break
        if len(seen) == 1:
            said = f"{folder}: all labels ('{schema.label}') of split '{split}' are {seen.pop():g}"
            if split == "test":
                logger.warning("%s; AUC is undefined there", said)
                continue
            why = "nothing can be learned" if split == "train" else "no result can be told from a better one"
            raise ValueError(f"{said}, so {why}; split the rows anew, at random or at another time, or mend the label")
