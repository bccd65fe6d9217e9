"""A store, and a proxy before it, for tests of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.proxy import Proxy, proxy
from tests.storage.runs import forget_stores
from tests.storage.server import BUCKET, s3_server


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies and scratch files lie with the tests'."""
    monkeypatch.setenv("MDR_STORE_CACHE", str(tmp_path_factory.getbasetemp() / "node"))


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server."""
    with s3_server() as found:
        yield found


@pytest.fixture
def settings(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The same, which this process goes by, too."""
    for name, value in {**server, "MDR_STORE_CACHE": str(tmp_path / "store"), "MDR_CACHE": str(tmp_path / "c")}.items():
        monkeypatch.setenv(name, value)
    forget_stores()
    yield server
    forget_stores()


@pytest.fixture
def store(settings: dict[str, str], tmp_path: Path) -> str:
    """A folder in its bucket."""
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def between(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, by which this process goes."""
    with proxy(settings["AWS_ENDPOINT_URL"], seed=7) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.address)
        yield made
