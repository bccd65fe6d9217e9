"""A bundle behind HTTP, on this machine alone: rows in, scores out, adapters put and rolled back while it runs.

    python examples/serve.py BUNDLE --port 8080

    curl -d '{"rows": [{"item": 7, "genres": [1, 2], "price": 0.5, "domain_scenario": "home"}]}' localhost:8080/score
    curl -T cart.safetensors localhost:8080/adapters
    curl -X POST localhost:8080/adapters/scenario/cart/rollback
    curl -X DELETE localhost:8080/adapters/scenario/cart

A row holds the ids and numbers that the model takes, and the name of its domain under each division, null where there
is none. The page at / shows domains, versions, calibration and traffic. It is an example: no TLS, no log-in, one
process.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.data.schema import domain_column
from torchrec_mdr.inference import AdapterFile, Scorer

PAGE = Path(__file__).with_name("serve.html")
LARGEST = torch.finfo(torch.float32).max


class Service:
    """A scorer, the threads that it scores in, and the traffic of each domain.

    Args:
        bundle (str): its folder, on a disk or in an object store.
        threads (int): how many requests are scored at a time.
    """

    def __init__(self, bundle: str, threads: int = 2) -> None:
        self.scorer = Scorer(bundle, threads=threads)
        self.threads = ThreadPoolExecutor(threads)
        self.traffic: Counter[tuple[str, str]] = Counter()
        self._told: dict[tuple[str, str, int], dict[str, Any]] = {}  # what the files of versions that serve say

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[sentences], client_max_size=64 * 2**20)
        adapter = "/adapters/{division}/{domain}"
        app.add_routes(
            [
                web.get("/", self.page),
                web.get("/status", self.status),
                web.post("/score", self.score),
                web.put("/adapters", self.put),
                web.put("/adapters/{name}", self.put),  # curl -T adds the file's name
                web.post(f"{adapter}/rollback", self.rollback),
                web.delete(adapter, self.remove),
            ]
        )
        return app

    async def page(self, request: web.Request) -> web.StreamResponse:
        """The page for a browser."""
        return web.FileResponse(PAGE)

    async def score(self, request: web.Request) -> web.Response:
        """`{"rows": [...]}` -> the rows' scores, in order, and the versions that gave them, 0 for the backbone."""
        content = await request.json()
        rows = content.get("rows") if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ValueError('a request is {"rows": [{...}, ...]}')
        return web.json_response(await self._aside(self._score, rows))

    async def put(self, request: web.Request) -> web.Response:
        """An adapter file -> the version under which it serves."""
        content = await request.read()
        adapter = AdapterFile.from_bytes(content, request.match_info.get("name", "the request"))
        version = await self._aside(self.scorer.put, adapter)
        return web.json_response({"domain": adapter.info.domain, "version": version})

    async def rollback(self, request: web.Request) -> web.Response:
        """The version that serves from now on."""
        found = request.match_info
        version = await self._aside(self.scorer.rollback, found["domain"], found["division"])
        return web.json_response({"domain": found["domain"], "version": version})

    async def remove(self, request: web.Request) -> web.Response:
        """Makes a domain unknown."""
        found = request.match_info
        await self._aside(self.scorer.remove, found["domain"], found["division"])
        return web.json_response({"domain": found["domain"], "version": 0})

    async def status(self, request: web.Request) -> web.Response:
        """What the page shows."""
        return web.json_response(await self._aside(self._status))

    async def _aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def _score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        manifest = self.scorer.manifest
        dense = torch.tensor(
            [[_number(row, name, place) for name in manifest.dense_features] for place, row in _each(rows)]
        )
        ids = [_ids(row, name, place) for name in manifest.features for place, row in _each(rows)]
        features = KeyedJaggedTensor(
            list(manifest.features),
            torch.tensor([one for own in ids for one in own], dtype=torch.int64),
            lengths=torch.tensor([len(own) for own in ids], dtype=torch.int64),
            stride=len(rows),
        )
        divisions = [division.name for division in manifest.divisions]
        domains = [[_domain(row, domain_column(name), place) for name in divisions] for place, row in _each(rows)]
        scores = self.scorer.score(dense.view(len(rows), len(manifest.dense_features)), features, domains)
        for own, versions in zip(domains, scores.versions.tolist(), strict=True):
            known = zip(divisions, own, versions, strict=True)
            self.traffic.update((name, str(domain) if version else "(unknown)") for name, domain, version in known)
        return {"scores": scores.probabilities.tolist(), "versions": scores.versions.tolist()}

    def _status(self) -> dict[str, Any]:
        adapters, told = self.scorer.list(), {}
        for own in adapters:
            version = own["division"], own["domain"], own["version"]
            told[version] = self._told[version] if version in self._told else self._read(*version)
            own |= {**told[version], "rows": self.traffic[version[:2]]}
        self._told = told
        unknown = {
            division.name: self.traffic[division.name, "(unknown)"] for division in self.scorer.manifest.divisions
        }
        return {
            "bundle": self.scorer.store.bundle,
            "method": self.scorer.manifest.method,
            "adapters": adapters,
            "unknown": unknown,
        }

    def _read(self, division: str, domain: str, version: int) -> dict[str, Any]:
        """What a version's file says; it never changes."""
        adapter = self.scorer.store.load(division, domain, version)
        affine = adapter.tensors.get("calibration.affine")
        return {"calibration": None if affine is None else affine.tolist(), "validation": adapter.info.validation}


@web.middleware
async def sentences(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Bad input is answered by one sentence and status 400."""
    try:
        return await handler(request)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)


def _each(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {place} is no object with the features' names")
    return list(enumerate(rows))


def _number(row: dict[str, Any], name: str, place: int) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"row {place}: '{name}' must be a number, not {value!r}")
    return float(value)


def _ids(row: dict[str, Any], name: str, place: int) -> list[int]:
    value = row.get(name)
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or not -(2**63) <= one < 2**63 for one in ids):
        raise ValueError(f"row {place}: '{name}' must be an id or a list of ids, not {value!r}")
    return ids


def _domain(row: dict[str, Any], name: str, place: int) -> str | None:
    value = row.get(name, ...)
    if value is not None and not isinstance(value, str):
        shown = "left out" if value is ... else repr(value)
        raise ValueError(f"row {place}: '{name}' must be a domain's name, or null where it has none, not {shown}")
    return value


def main() -> None:
    """Serves a bundle until it is interrupted."""
    parser = argparse.ArgumentParser(description="Serves a bundle over HTTP, on this machine alone.")
    parser.add_argument("bundle", help="its folder, on a disk or in an object store")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    service = Service(given.bundle, given.threads)
    web.run_app(service.app(), host="127.0.0.1", port=given.port)


if __name__ == "__main__":
    main()
