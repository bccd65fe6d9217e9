"""What README and the pages in docs/ say is true: snippets run, outputs are those shown, names and links exist."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from difflib import unified_diff
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from packaging.requirements import Requirement

from tests.pages import DEFAULT_RUN, PAGES, ROOT, RUN, PageRun, assert_shows, blocks, noted
from tests.test_floors import FLOORS
from torchrec_mdr.compare.compatibility import method_backbone_matrix
from torchrec_mdr.data.importing.options import ImportOptions
from torchrec_mdr.plan import PlanOptions
from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS
from torchrec_mdr.training.config import RunConfig, StagesConfig
from torchrec_mdr.training.options import parse

README = PAGES["README"].read_text()
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "examples").rglob("README.md")]
QUICK = [page for page in PAGES if any(block.language in RUN and not block.is_full for block in blocks(page))]
FULL = [page for page in PAGES if any(block.language in RUN and block.is_full for block in blocks(page))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """A page may open one; what fails in between must not leave it to the tests that follow."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", QUICK)
def test_snippets_run(page: str, tmp_path: Path, cache: Path, no_process_group: None) -> None:
    folder = tmp_path / page
    folder.mkdir()
    PageRun(page, folder, cache).run(with_full=False)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", FULL)
def test_all_snippets_run(page: str, tmp_path: Path, cache: Path, no_process_group: None) -> None:
    folder = tmp_path / page
    folder.mkdir()
    printed = PageRun(page, folder, cache).run(with_full=True)
    if page == "first_run":
        shown = noted(DEFAULT_RUN)
        assert {block.page for block in shown} == {"README", "first_run"}
        for block in shown:
            assert_shows(block, printed["full, the default run"])


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "torchrec_mdr.html").read_text().count("MultiDomainModel") > 1


def test_the_adapted_loop_is_the_plain_one_and_twenty_lines() -> None:
    (block,) = [block for page in PAGES for block in blocks(page) if block.note.startswith("diff ")]
    names = block.note.split()[1:]
    texts = [(ROOT / name).read_text() for name in names]
    plain, adapted = (text[text.index("from __future__") :].splitlines() for text in texts)
    shown = [line for line in unified_diff(plain, adapted, *names, n=1, lineterm="") if not line.startswith("@@")]
    assert block.code.splitlines() == shown
    changed = [line[1:] for line in shown[2:] if line[0] in "+-" and line[1:].strip()]
    assert len(changed) <= 20


def test_notes_and_languages_are_known() -> None:
    """A note that is misspelt would leave its block unchecked."""
    known = re.compile(rf"|full(, .*)?|output|{DEFAULT_RUN}|compatibility|floors|file \S+|diff \S+ \S+")
    for page in PAGES:
        text = PAGES[page].read_text()
        for block in blocks(page):
            assert known.fullmatch(block.note), f"{page}: note '{block.note}'"
            assert block.language in (*RUN, "text", "json", "toml", "diff", "{toctree}", "{eval-rst}"), (
                f"{page}, {block.line}"
            )
        others = text.count("<!-- test: compatibility -->")
        assert text.count("<!-- test:") == sum(bool(block.note) for block in blocks(page)) + others, page


def test_the_wrapped_dlrm_of_readme_equals_the_dlrm() -> None:
    (block,) = (block for block in blocks("README") if block.language == "python")
    before_wrapping, wrapping = block.code.split("model = MultiDomainModel", 1)
    names: dict[str, Any] = {}
    exec(before_wrapping, names)  # noqa: S102
    plain = copy.deepcopy(names["dlrm"])
    dense = torch.rand(2, 4)
    exec("model = MultiDomainModel" + wrapping, names)  # noqa: S102
    assert names["logits"].shape == (2, 1)
    domain_ids = torch.tensor([0, 11])
    assert torch.equal(names["model"](dense, names["items"], domain_ids), plain(dense, names["items"]))


def test_excerpts_are_those_of_the_files() -> None:
    excerpts = [block for page in PAGES for block in blocks(page) if block.note.startswith("file ")]
    assert len(excerpts) > 4
    for block in excerpts:
        path = block.note.removeprefix("file ")
        assert unindented(block.code) in unindented((ROOT / path).read_text()), f"{block.page}: {path} has changed"


def unindented(code: str) -> str:
    """Code without indentation and empty lines, which the formatter sets anew in an excerpt."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def test_methods_backbones_and_data_sets_that_are_named_exist() -> None:
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*) \|$", PAGES["commands"].read_text(), re.MULTILINE))
    for option, known in (("method", METHODS), ("backbone", BACKBONES), ("dataset", DATASETS)):
        words = re.findall(r"`([a-z0-9_\-]+)`", rows[option])
        assert {word for word in words if not word.startswith("--")} == set(known), option


def test_the_matrix_of_methods_and_backbones_is_the_codes() -> None:
    assert f"<!-- test: compatibility -->\n{method_backbone_matrix()}\n" in PAGES["commands"].read_text()


def test_the_floors_are_those_that_are_tested() -> None:
    (block,) = noted("floors")
    assert [set(line.split(", ")) for line in block.code.splitlines()] == FLOORS


def known_options() -> set[str]:
    """Options of the commands here and of those that pages call."""
    from torchrec_mdr.launch.mdr import train

    options = {f"stages.{stage.name}.{name}" for stage in fields(StagesConfig) for name in stage_names()}
    for kind, registry in (("method_options", METHODS), ("backbone_options", BACKBONES), ("dataset_options", DATASETS)):
        options |= {f"{kind}.{field.name}" for name in registry for field in fields(registry[name])}
    options |= {f"synthetic.{field.name}" for field in fields(DATASETS["synthetic"])}
    options |= {f"embeddings.{field.name}" for field in fields(RunConfig().embeddings)}
    options |= {field.name for field in fields(RunConfig)} | {*signature(train).parameters}
    options |= {field.name for field in (*fields(ImportOptions), *fields(PlanOptions))}
    options |= {"config", "help", "print_config", "output"}  # of several commands
    options |= {"parallel", "report_only", "scheduler", "scheduler_args", "component_args"}  # of compare
    options |= {"run", "bundle", "input", "keep", "domain"}  # of runs and bundles
    options |= {"again", "calibrate", "int8", "adapter_dtype", "resident", "eager", "port"}  # of export, serve.py
    others = {"no-deps", "dryrun", "workspace", "nproc_per_node"}  # pip, torchx, torchrun
    others |= {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts"}
    others |= {"signals-to-handle", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "requeue"}
    others |= {"signal", "kill-on-bad-exit"}  # of Slurm, as four before
    return options | others | {"rows", "measures"}  # benchmarks


def stage_names() -> set[str]:
    return {field.name for field in fields(RunConfig().stages.adapt)}


def test_options_that_are_named_exist() -> None:
    known = known_options()
    for page, path in PAGES.items():
        for option in re.findall(r"(?<![\w-])--([a-z][\w.\-]*\w)", path.read_text()):
            assert option in known, f"{page} names --{option}"


def test_the_recipes_are_those_of_the_code(tmp_path: Path) -> None:
    from torchrec_mdr.prepare import prepare

    own = prepare("synthetic", output=str(tmp_path / "own"), rows=125_000, num_domains=2)
    movielens = ["--dataset=movielens-1m", "--data_dir=none"]
    columns = [
        yaml.safe_load(parse([*movielens, f"--protocol={protocol}", f"--recipe={recipe}"]).resolved)
        for recipe in ("recommended", "paper")
        for protocol in ("mlora", "multilora")
    ] + [yaml.safe_load(parse([f"--dataset={own}"]).resolved)]
    rows = re.findall(r"^\| `([a-z]\S+)` \| (.*) \|$", PAGES["recipes"].read_text(), re.MULTILINE)
    assert len(rows) > 15
    for name, cells in rows:
        for cell, column in zip(cells.split(" | "), columns, strict=True):
            value: Any = column
            for part in name.split("."):
                value = value[part]
            assert str(value).replace("'", "") == str(yaml.safe_load(cell)).replace("'", ""), name


def test_the_tree_in_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"## The tree\n\n```text\n(.*?)```", README, re.DOTALL)
    name = re.compile(r"[\w.]+(?:/|\.py)(?=[\s,:]|$)")
    top = {found for line in tree.splitlines() if not line.startswith(" ") for found in name.findall(line)}
    package = {found for line in tree.splitlines() if line.startswith(" ") for found in name.findall(line)}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]

    def entries(folder: Path, with_files: bool) -> set[str]:
        kept = [path for path in folder.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ignored)]
        folders = {f"{path.name}/" for path in kept if path.is_dir() and not path.name.startswith(".")}
        files = {path.name for path in kept if path.suffix == ".py" and path.name != "__init__.py"}
        return folders | files if with_files else folders

    assert top == entries(ROOT, with_files=False)
    assert package == entries(ROOT / "torchrec_mdr", with_files=True)


def test_links_lead_somewhere() -> None:
    """Those of pages that are read on their own; Sphinx checks the others."""
    for path in [PAGES["README"], *OTHER_PAGES]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_pages_that_code_cites_are_in_the_repository() -> None:
    written = {"results.md", "new_domain.md"}  # by compare and by an example
    for folder in ("torchrec_mdr", "benchmarks", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            cited = set(re.findall(r"[\w/.\-]+\.md\b", path.read_text())) - written
            assert all((ROOT / page).exists() for page in cited) or path == Path(__file__), f"{path}: {cited}"


@pytest.mark.parametrize("page", ["README", "first_run"])
def test_the_lines_for_a_cpu_are_those_of_make_setup(page: str) -> None:
    lines = r"^pip install (-r \S+)\npip install (--no-deps torchrec==\S+)\npip install \.$"
    ((stack, torchrec),) = re.findall(lines, PAGES[page].read_text(), re.MULTILINE)
    made = (ROOT / "Makefile").read_text()
    assert f"$(PIP) {stack}\n" in made and f"$(PIP) {torchrec}\n" in made


def test_the_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]* \|$", PAGES["first_run"].read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(extras)
    for name, brings in rows:
        if name != "dev":
            assert set(brings.split(", ")) == {Requirement(line).name for line in extras[name]}, name


def test_readme_is_short() -> None:
    assert len(README.split()) < 1400
