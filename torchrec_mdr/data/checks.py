"""What is checked of a prepared data set before anything is trained on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchrec_mdr.data.reader import SplitReader
from torchrec_mdr.data.schema import SPLITS, Schema

LARGEST = 1e6  # of a dense feature; beyond it a column was not scaled, such as a time in seconds


def check_splits(folder: str, schema: Schema, divisions: Sequence[str]) -> None:
    """Checks that each split is there, has rows and the schema's columns, and numbers of a size to train on.

    Reads no rows.

    Raises:
        ValueError: see :class:`SplitReader`; or a split has no rows, or a dense feature is huge.
    """
    for split in SPLITS:
        if not schema.rows[split]:
            raise ValueError(
                f"{folder}: split '{split}' has no rows, and training needs some in each of {', '.join(SPLITS)}"
            )
        _check_scale(SplitReader(folder, schema, split, divisions))


def check_values(folder: str, schema: Schema, divisions: Sequence[str]) -> None:
    """Reads all validation and test rows, so that a bad value is found before training and not after it.

    Raises:
        ValueError: see :meth:`SplitReader.rows`.
    """
    for split in SPLITS[1:]:
        reader = SplitReader(folder, schema, split, divisions)
        for _ in reader.all_rows():
            pass


def _check_scale(reader: SplitReader) -> None:
    """Refuses dense features of huge values, as far as the files' statistics tell."""
    for file in reader.files:
        for name in reader.schema.dense_features:
            if LARGEST < file.largest(name) < math.inf:
                raise ValueError(
                    f"{file.path}: column '{name}' holds values of up to {file.largest(name):.3g}, and dense features "
                    "enter the model as they are; scale it to about unit size, as python -m torchrec_mdr.prepare does"
                )
