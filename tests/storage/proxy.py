"""A proxy before an HTTP server: drops connections, cuts bodies, delays, answers 503, as a seeded script says."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("drop", "half sent", "answer lost", "half read", "503", "delay")
_ERRORS = {"503": (503, "SlowDown"), "denied": (403, "AccessDenied"), "gone": (404, "NoSuchBucket")}


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, most of them.

    Args:
        server (str): its address.
        share (float): of requests that a fault strikes.
        seed (int): decides which.
        faults (Sequence[str]): that may happen, evenly.
    """

    daemon_threads = True

    def __init__(self, server: str, share: float, seed: int, faults: Sequence[str] = FAULTS) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(server).netloc
        self.share, self.faults = share, faults
        self.mode: str | None = None  # "denied", "gone" or "silent": what becomes of all requests
        self.happened: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        """What happens to the next request."""
        with self._lock:
            fault = self.mode or (self._random.choice(self.faults) if self._random.random() < self.share else None)
            self.happened[fault or "none"] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


@contextmanager
def proxy(server: str, share: float = 0.0, seed: int = 0, faults: Sequence[str] = FAULTS) -> Iterator[Proxy]:
    """Runs one in a thread."""
    made = Proxy(server, share, seed, faults)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _any(self) -> None:
        fault = self.server.next_fault()
        length = int(self.headers.get("Content-Length") or 0)
        if fault in ("drop", "half sent"):
            self.rfile.read(length // 2 if fault == "half sent" else 0)
            self._hang_up()
            return
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault == "silent":
            time.sleep(3600)
        if fault == "delay":
            time.sleep(0.3)
        if fault in _ERRORS:
            status, code = _ERRORS[fault]
            self._answer(
                status, {}, f"<Error><Code>{code}</Code><Message>{code} by the proxy</Message></Error>".encode()
            )
            return
        onward = http.client.HTTPConnection(self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        onward.request(self.command, self.path, body, headers)
        answer = onward.getresponse()
        content = answer.read()
        onward.close()
        if fault == "answer lost":
            self._hang_up()
            return
        self._answer(answer.status, dict(answer.getheaders()), content, cut=fault == "half read")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        kept = {
            name: value for name, value in headers.items() if name.lower() not in ("transfer-encoding", "connection")
        }
        if self.command != "HEAD":
            kept = {name: value for name, value in kept.items() if name.lower() != "content-length"}
            kept["Content-Length"] = str(len(content))
        for name, value in kept.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._hang_up()

    def _chunks(self) -> bytes:
        found = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(found)

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def log_message(self, *args: Any) -> None:
        """Nothing."""
