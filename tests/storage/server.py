"""A real S3 server process on loopback, moto's, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "mdr-tests"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
# moto answers several requests at once, and then does not tell two writers who was first, as S3 does
SERVER = """
import os, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

app, one = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_by_one(environ, start_response):
    with one:
        return app(environ, start_response)

def end_with_the_tests():
    sys.stdin.read()
    os._exit(0)

server = make_server("127.0.0.1", 0, one_by_one, threaded=True)
threading.Thread(target=end_with_the_tests, daemon=True).start()
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Starts one with an empty bucket; gives the environment that leads to it."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None
    try:
        port = server.stdout.readline().decode().strip()
        assert port, "moto's server has ended"
        address = f"http://127.0.0.1:{port}"
        # moto takes unsigned requests, and makes a bucket of a PUT
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
        yield {**KEYS, "AWS_ENDPOINT_URL": address}
    finally:
        server.kill()
        server.communicate()


def environment(settings: dict[str, str]) -> dict[str, str]:
    """For a process that is to find the server."""
    return {**os.environ, **settings}
