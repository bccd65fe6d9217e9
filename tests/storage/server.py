"""A real S3 server process on loopback, moto's, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "mdr-tests"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Starts one with an empty bucket; gives the environment that leads to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # moto's server as `moto_server -p PORT` starts it, with quiet logs
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, server)
        # moto takes unsigned requests, and makes a bucket of a PUT
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
        yield {**KEYS, "AWS_ENDPOINT_URL": address}
    finally:
        server.kill()
        server.wait()


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert server.poll() is None, "moto's server has ended"
        try:
            urllib.request.urlopen(f"{address}/moto-api/").close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError("moto's server does not answer")


def environment(settings: dict[str, str]) -> dict[str, str]:
    """For a process that is to find the server."""
    return {**os.environ, **settings}
