"""What variants must have in common before they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrec_mdr.compare.grid import read_grid
from torchrec_mdr.compare.plan import plan
from torchrec_mdr.compare.settings import check_settings, settings_facts
from torchrec_mdr.prepare import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of one's own data, on which the papers' recipe differs by method."""
    return prepare("synthetic", output=str(tmp_path_factory.mktemp("data") / "mine"), rows=500, num_domains=2)


def refusal(path: Path, data: str, methods: list[Any], **changes: Any) -> str:
    """What check_settings says; empty where variants may be compared."""
    options = {"dataset": f"{data}/", "recipe": "paper", **changes.pop("options", {})}
    content = {"options": options, "grids": [{"backbones": ["mlp"], "methods": methods}], **changes}
    path.write_text(yaml.safe_dump(content))
    grid = read_grid(str(path))
    try:
        check_settings(grid, plan(grid.cells))
    except ValueError as error:
        return str(error)
    return ""


def test_unequal_settings_are_refused_unless_asked_for(tmp_path: Path, data: str) -> None:
    path = tmp_path / "grid.yaml"
    said = refusal(path, data, ["mlora", "mix"])
    assert "'batch_size' is 1024 for variant 'mlora' and 4096 for 'mix'" in said or "'mlora'" in said
    assert "'unequal: true'" in said
    assert refusal(path, data, ["mlora", "mix"], unequal=True) == ""
    assert refusal(path, data, ["mlora", "moe_mlora"]) == ""
    assert refusal(path, data, ["mlora", "mix"], options={"recipe": "recommended"}) == ""


def test_what_a_variant_names_itself_may_differ(tmp_path: Path, data: str) -> None:
    heavy = {"name": "heavy", "method": "mlora", "options": {"stages.pretrain.embedding_l2": 0.5, "batch_size": 64}}
    assert refusal(tmp_path / "grid.yaml", data, ["mlora", heavy]) == ""
    grid = read_grid(str(tmp_path / "grid.yaml"))
    ((name, text),) = settings_facts(plan(grid.cells))
    assert name == "settings on mine, scenario, mlp" and "recipe paper" in text and "embeddings.dim 8" in text
    assert "batch_size 1024 (mlora), 64 (heavy)" in text


def test_a_grid_that_names_no_protocol_has_one_for_all(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    content = {"options": {"dataset": "movielens-1m"}, "grids": [{"backbones": ["mlp"], "methods": ["mix", "mlora"]}]}
    path.write_text(yaml.safe_dump(content))
    assert {cell.options["protocol"] for cell in read_grid(str(path)).cells} == {"mlora"}
    content["options"]["protocol"] = "multilora"
    path.write_text(yaml.safe_dump(content))
    assert {cell.options["protocol"] for cell in read_grid(str(path)).cells} == {"multilora"}
