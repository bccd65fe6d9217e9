"""The files that say how raw rows become features; they stand beside `schema.json` and travel with a run."""

from __future__ import annotations

from torchrec_mdr.storage import isfile, read_bytes, write_bytes

FEATURES_FILE = "features.yaml"
VOCABULARIES_FILE = "vocabularies.parquet"
FEATURE_FILES = (FEATURES_FILE, VOCABULARIES_FILE)


def has_features(folder: str) -> bool:
    """Whether a folder says how raw rows become its features."""
    return isfile(f"{folder.rstrip('/')}/{FEATURES_FILE}")


def copy_features(source: str, target: str) -> bool:
    """Copies a plan's files from one folder to another; gives whether there are any."""
    if not has_features(source):
        return False
    for name in reversed(FEATURE_FILES):  # the file that says they are there comes last
        write_bytes(f"{target}/{name}", read_bytes(f"{source.rstrip('/')}/{name}"))
    return True
