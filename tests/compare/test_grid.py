"""What a grid file comes to, and every way of getting one wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from torchrec_mdr.compare.grid import Cell, Grid, read_grid
from torchrec_mdr.compare.plan import plan
from torchrec_mdr.training.options import parse

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def read(tmp_path: Path, content: Any, data_dir: str | None = None) -> Grid:
    path = tmp_path / "grid.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_grid(str(path), data_dir)


def small(**changes: Any) -> dict[str, Any]:
    return {"grids": [{"backbones": ["mlp"], "methods": ["mix"]}], **changes}


def entry(**changes: Any) -> dict[str, Any]:
    return small(grids=[{"backbones": ["mlp"], "methods": ["mix"], **changes}])


def test_a_grid_is_the_product_of_what_it_lists(tmp_path: Path) -> None:
    added = {"name": "added", "method": "multilora", "options": {"method_options": {"fusion": "add"}}}
    first = {"backbones": ["mlp", "wdl"], "divisions": ["scenario", "segment"], "methods": ["mix", added]}
    second = {"backbones": ["dcn"], "methods": ["mix"], "seeds": [7], "options": {"batch_size": 8}}
    common = {"batch_size": 64, "stages.pretrain.epochs": 1}
    grid = read(tmp_path, {"options": common, "seeds": [0, 1], "grids": [first, second], "title": "T"})
    found = [(c.backbone, c.options.get("division"), c.variant, c.method, c.seed) for c in grid.cells]
    expected = [
        (backbone, division, variant, method, seed)
        for division in ("scenario", "segment")
        for backbone in ("mlp", "wdl")
        for seed in (0, 1)
        for variant, method in (("mix", "mix"), ("added", "multilora"))
    ]
    assert found == [*expected, ("dcn", None, "mix", "mix", 7)]
    assert grid.cells[1].options["method_options.fusion"] == "add"
    assert "method_options.fusion" not in grid.cells[0].options
    assert [c.options["batch_size"] for c in (grid.cells[0], grid.cells[-1])] == [64, 8]
    assert grid.title == "T" and grid.baselines == ("mix",) and grid.variants["added"] == "multilora"


def test_options_reach_the_command_line_as_they_are_meant() -> None:
    options = {"dataset": "synthetic", "auxiliary_division": ["segment"], "backbone_options.batch_norm": True}
    read = parse(Cell("v", "multilora", "mlp", {**options, "division": None}, 3, "here").arguments())
    assert read.run.auxiliary_division == ["segment"] and read.run.seed == 3 and read.run.division is None
    assert "batch_norm: true" in read.resolved


def test_original_files_are_named_where_a_data_set_has_some(tmp_path: Path) -> None:
    grid = read(tmp_path, entry(datasets=["synthetic", "movielens-1m"]), "/data")
    assert [cell.options.get("data_dir") for cell in grid.cells] == [None, "/data"]


def test_baselines_are_the_papers_or_those_that_are_named(tmp_path: Path) -> None:
    methods = ["mix", "mlora", {"name": "deep", "method": "star"}]
    assert read(tmp_path, entry(methods=methods)).baselines == ("mix", "deep")
    assert read(tmp_path, {**entry(methods=methods), "baselines": ["mlora"]}).baselines == ("mlora",)


TWICE = [{"name": "x", "method": "mix"}, {"name": "x", "method": "star"}]
TWO_BACKBONES = {"backbones": ["mlp", "wdl"], "methods": ["mix"]}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("a: [", ["cannot be read"]),
        ("just text", ["the file is no mapping"]),
        ({}, ["the file lacks 'grids'"]),
        (small(colour="red"), ["the file has 'colour'", "choose from title"]),
        (small(title=3), ["title is 3"]),
        (small(seeds=[]), ["seeds is no list"]),
        (small(seeds=[1, 1]), ["seeds is [1, 1]", "each once"]),
        (small(seeds=["a"]), ["whole numbers"]),
        (small(grids=[]), ["grids is no list"]),
        (small(options={"seed": 1}), ["options holds 'seed'", "under 'seeds'"]),
        (small(options=[1]), ["options is no mapping"]),
        (small(baselines=["star"]), ["baselines names 'star'"]),
        (entry(backbone="mlp"), ["grids[0] has 'backbone'"]),
        (entry(backbones=["mpl"]), ["grids[0].backbones names 'mpl'", "choose one of mlp"]),
        (entry(methods=["mixx"]), ["grids[0].methods[0] names 'mixx'"]),
        (entry(methods=[{"name": "x"}]), ["grids[0].methods[0] lacks 'method'"]),
        (entry(methods=[{"name": "a/b", "method": "mix"}]), ["is named 'a/b'"]),
        (entry(methods=[{"name": "backbone", "method": "mix"}]), ["is named 'backbone'"]),
        (entry(methods=[{"method": "mix", "option": {}}]), ["has 'option'", "name, method, options"]),
        (entry(methods=TWICE), ["grids[0].methods[1]", "'x' stands for two different things"]),
        (entry(datasets=["movielens"]), ["datasets names 'movielens'", "slash"]),
        (entry(options={"resume": True}), ["grids[0].options holds 'resume'"]),
        (small(published={"paper": {"star": 0.8}}), ["published 'paper' names 'star'"]),
        (small(published={"paper": {"mix": "high"}}), ["'mix' is 'high'", "a number"]),
        (small(published={"paper": {"mix/mlp": 0.8}}), ["VARIANT/BACKBONE/DIVISION"]),
        (small(published={"paper": {"mix/wdl/age": 0.8}}), ["no run 'mix/wdl/age'"]),
        (small(grids=[TWO_BACKBONES], published={"paper": {"mix": 0.8}}), ["'mix' runs in several places"]),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_mend(tmp_path: Path, content: Any, names: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content)
    sentence = str(caught.value)
    assert "\n" not in sentence and "grid.yaml" in sentence
    assert all(name in sentence for name in names), sentence


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        read_grid(str(tmp_path / "none.yaml"))


RUNS = {
    "multilora_table3": 39,
    "multilora_table5": 27,
    "moe_mlora_table1": 102,
    "moe_mlora_figure2": 15,
    "paper_recipe": 30,
    "mlora_questions": 27,
    "mlora_gain": 12,
    "single_lora_rank": 18,
    "control": 6,
    "division_trials": 15,
    "search_adapters": 12,
    "search_backbone": 28,
    "search_products": 16,
}

# on folders that another command makes, see tests/experiments; and on files that are no part of the project
OWN_DATA = {"when_it_pays", "amazon_2018", "amazon_2018_search"}


def test_all_examples_are_looked_at() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(RUNS) | OWN_DATA


@pytest.mark.parametrize(("name", "runs"), RUNS.items())
def test_the_examples_hold_only_options_that_exist(name: str, runs: int) -> None:
    grid = read_grid(str(EXAMPLES / f"{name}.yaml"), "/data")
    assert len(grid.cells) == runs
    assert bool(grid.published) == ("_table" in name or "_figure" in name)
    for cell in {(c.variant, c.backbone): c for c in grid.cells}.values():
        assert parse(cell.arguments()).run.data_dir == "/data"


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_every_run_of_the_examples_can_be_built(name: str, movielens_1m: Path) -> None:
    cells = read_grid(str(EXAMPLES / f"{name}.yaml"), str(movielens_1m)).cells
    runs = plan([cell for cell in cells if cell.seed == cells[0].seed])
    assert {run.key: run.refusal for run in runs if run.refusal is not None} == {}
