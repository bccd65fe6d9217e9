"""The HTTP example: rows in, scores out, adapters put and rolled back while a load runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from tests.helpers import load_example
from tests.inference.models import rows_for
from tests.inference.runs import finished, other_adapters
from torchrec_mdr.inference import Run, export

NAMES = ["home", "cart", "search"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("serve")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("serve")
    run = finished(folder / "run", "mlora", "--backbone=dlrm")
    export(run, str(folder / "bundle"), compiled=False)
    return run


def as_json(rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    dense, features, ids = rows
    columns = {name: own.to_dense() for name, own in features.to_dict().items()}
    return [
        {
            "x": float(dense[place, 0]),
            "y": float(dense[place, 1]),
            "a": int(columns["a"][place]),
            "b": columns["b"][place].tolist(),
            "c": int(columns["c"][place]),
            "domain_scenario": NAMES[int(ids[place, 0])],
        }
        for place in range(len(dense))
    ]


def test_it_scores_and_changes_adapters_under_load(
    example: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = example.Service(str(Path(run.folder).parent / "bundle"))
    rows = rows_for(run.model, 33)
    with torch.no_grad():
        wanted = torch.sigmoid(run.model(*rows).flatten().double())
    sent = {"rows": as_json(rows)}
    first_row = sent["rows"][0]
    unnamed = {name: value for name, value in first_row.items() if name != "domain_scenario"}
    adapter = other_adapters(run, seed=2)[1].to_bytes()
    mine = rows[2][:, 0] == 1

    async def talk() -> None:
        async with TestClient(TestServer(service.app())) as client:

            async def score() -> tuple[torch.Tensor, list[list[int]]]:
                answer = await (await client.post("/score", json=sent)).json()
                return torch.tensor(answer["scores"], dtype=torch.float64), answer["versions"]

            first, versions = await score()
            torch.testing.assert_close(first, wanted, rtol=1e-6, atol=1e-6)
            assert versions == [[1]] * 33
            done = False

            async def load() -> list[tuple[torch.Tensor, list[list[int]]]]:
                found = []
                while not done:
                    found.append(await score())
                return found

            loads = [asyncio.create_task(load()) for _ in range(2)]
            for version in range(2, 8):
                put = await client.put("/adapters/cart.safetensors", data=adapter)
                assert await put.json() == {"domain": "cart", "version": version}
                back = await client.post("/adapters/scenario/cart/rollback")
                assert await back.json() == {"domain": "cart", "version": 1}
            await client.put("/adapters", data=adapter)
            second, versions = await score()
            done = True
            assert {version for (version,) in versions} == {1, 8}
            for task in loads:
                for scores, _ in await task:
                    assert torch.equal(scores[~mine], first[~mine])
                    assert torch.equal(scores[mine], first[mine]) or torch.equal(scores[mine], second[mine])
            read = []
            load_file = service.scorer.store.load
            monkeypatch.setattr(service.scorer.store, "load", lambda *own: read.append(own) or load_file(*own))
            for _ in range(3):
                status = await (await client.get("/status")).json()
            assert sorted(read) == [("scenario", "cart", 8), ("scenario", "home", 1), ("scenario", "search", 1)]
            cart = next(own for own in status["adapters"] if own["domain"] == "cart")
            assert cart["version"] == 8 and cart["calibration"] == [1.0, 0.0] and cart["rows"] > 0
            assert "Adapters that serve" in await (await client.get("/")).text()
            await client.delete("/adapters/scenario/cart")
            _, versions = await score()
            assert {version for (version,) in versions} == {0, 1}
            status = await (await client.get("/status")).json()
            assert status["unknown"]["scenario"] == int(mine.sum())
            for method, path, body, words in (
                ("POST", "/adapters/scenario/cart/rollback", b"", "no adapter for domain 'cart'"),
                ("PUT", "/adapters", b"nonsense", "the request is no adapter file, or a damaged one"),
                ("POST", "/score", b'{"rows": 3}', "a request is"),
                ("POST", "/score", b"[]", "a request is"),
                ("POST", "/score", b'{"rows": [{"x": "a"}]}', "row 0: 'x' must be a number, not 'a'"),
                ("POST", "/score", b'{"rows": [{"x": 1e300}]}', "row 0: 'x' must be a number, not 1e+300"),
                ("POST", "/score", json.dumps({"rows": [{**first_row, "a": 2**63}]}), "row 0: 'a' must be an id or"),
                ("POST", "/score", json.dumps({"rows": [unnamed]}), "'domain_scenario' must be a domain's name, or"),
                ("POST", "/score", b'{"rows": [{"x": 1, "y": 2, "a": "q"}]}', "row 0: 'a' must be an id or a list"),
            ):
                answer = await client.request(method, path, data=body)
                assert answer.status == 400 and words in (await answer.json())["error"]

    asyncio.run(talk())
