"""Imports point one way, from high layers to low ones, and files stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "torchrec_mdr"
MAX_LINES = 350

# lowest first; what shares a layer may not import each other
LAYERS: list[set[str]] = [
    {"adapters"},
    {"data", "config"},
    {"stages", "metrics", "report", "selection"},
    {"backbones", "methods"},
    {"model", "checkpoint", "presets"},
    {"options"},
    {"distributed"},
    {"recipe"},
    {"progress", "growth"},
    {"fitting"},
    {"trainer"},
    {"train"},
    {"__init__"},
    {"benchmarks", "compare", "divisions", "inference", "matrix"},
]
LEVEL = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}
# where the layers would allow more than the architecture does
ONLY: dict[str, set[str]] = {
    "data": {"adapters.groups"},
    "config": set(),
    "metrics": {"data"},
    "report": {"data", "metrics"},
    "checkpoint": {"adapters", "data", "stages"},
}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def unit_of(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def imported(source: str, path: Path, package: Path) -> set[str]:
    """The package's modules that a file imports, as dotted names below the package; `__init__` for its public names."""
    name = package.name
    here = (name, *path.relative_to(package).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join([*start, *(node.module or "").split(".")]).rstrip(".")
            if base == name:
                submodules = {p.stem for p in package.iterdir() if p.suffix == ".py" or p.is_dir()}
                found |= {f"{name}.{a.name if a.name in submodules else '__init__'}" for a in node.names}
            else:
                found.add(base)
    return {m.removeprefix(f"{name}.") if m != name else "__init__" for m in found if m.split(".")[0] == name}


def breaches(path: Path, package: Path) -> list[str]:
    unit = unit_of(path, package)
    if unit not in LEVEL:
        return [f"{path.name}: '{unit}' is in no layer of tests/test_imports.py"]
    wrong = []
    for module in sorted(imported(path.read_text(), path, package)):
        other = module.split(".")[0]
        if other == unit:
            continue
        allowed = LEVEL.get(other, len(LAYERS)) < LEVEL[unit]
        if allowed and unit in ONLY:
            allowed = any(module == only or module.startswith(f"{only}.") for only in ONLY[unit])
        if not allowed:
            wrong.append(f"{path.relative_to(package)} imports {module}")
    return wrong


def test_imports_point_one_way() -> None:
    assert [breach for path in files(PACKAGE) for breach in breaches(path, PACKAGE)] == []


def test_files_are_short() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files(PACKAGE)}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("file", "statement", "is_wrong"),
    [
        ("data/loader.py", "from torchrec_mdr.ops.groups import BatchDomains", False),
        ("data/loader.py", "from torchrec_mdr.adapters.bank import LoRABank", True),
        ("data/loader.py", "from . import schema", False),
        ("data/loader.py", "from ..model import MultiDomainModel", True),
        ("methods/mlora.py", "import torchrec_mdr.training.trainer", True),
        ("methods/mlora.py", "from torchrec_mdr.registry import BACKBONES", True),
        ("methods/mlora.py", "def f():\n    from torchrec_mdr import trainer", True),
        ("model.py", "from torchrec_mdr import checkpoint", True),
        ("distributed/runtime.py", "from torchrec_mdr import checkpoint", False),
        ("distributed/runtime.py", "from torchrec_mdr import MultiDomainModel", True),
        ("benchmarks/adapter.py", "from torchrec_mdr import MultiDomainModel", False),
        ("train.py", "from torchrec_mdr.training.trainer import Trainer", False),
        ("surprise.py", "import torch", True),
    ],
)
def test_the_guard_sees(tmp_path: Path, file: str, statement: str, is_wrong: bool) -> None:
    package = tmp_path / "torchrec_mdr"
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    for module in ("checkpoint", "trainer"):
        (package / f"{module}.py").touch()
    (package / file).write_text(statement)
    assert bool(breaches(package / file, package)) == is_wrong
