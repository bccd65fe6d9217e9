"""Fixtures that several tests share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

# before torch is imported; the workers inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from tests.ranks import RankPool

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers do not depend on the tests before, which are other ones in each run of several processes."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the original data sets (`ml-1m`, `ml-100k`, ...); skips the test where there is none."""
    root = Path(os.environ.get("MDR_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data sets in {root}; name their folder in $MDR_DATA")
    return root


@pytest.fixture(scope="session")
def movielens_1m(data_root: Path) -> Path:
    """The folder of MovieLens-1M's original files; skips the test where it is missing."""
    return _data_set(data_root, "ml-1m")


@pytest.fixture(scope="session")
def movielens_100k(data_root: Path) -> Path:
    """The folder of MovieLens-100K's original files; skips the test where it is missing."""
    return _data_set(data_root, "ml-100k")


@pytest.fixture(scope="session")
def amazon_2018(data_root: Path) -> Path:
    """The folder of five original files of Amazon 2018; skips the test where it is missing."""
    return _data_set(data_root, "amazon2018-5core")


@pytest.fixture(scope="session")
def ali_ccp_sample(data_root: Path) -> Path:
    """The folder of Scenario-Wise-Rec's sample of Ali-CCP; skips the test where it is missing."""
    return _data_set(data_root, "ali-ccp-sample")


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two gloo processes, shared by all tests: `results = two_ranks.run(function, *args)`."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """One gloo process, for what two ranks are compared with."""
    pool = RankPool(1)
    yield pool
    pool.close()


def _data_set(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in {root}")
    return folder
