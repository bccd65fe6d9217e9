"""The house: a room imports only from floors below its own, and files stay short."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from torchrec_mdr.registry import BACKBONES, DATASETS, HOOKS, METHODS, METRICS, Registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "torchrec_mdr"
MAX_LINES = 320

# from the ground up; rooms on one floor do not import each other
FLOORS: list[set[str]] = [
    {"ops", "metrics", "storage"},
    {"adapters", "data"},
    {"methods", "backbones", "optim"},
    {"baselines", "model"},
    {"registry", "distributed"},
    {"training"},
    {"inference", "report"},
    {"compare", "experiments"},
    {"launch", "train", "prepare", "predict", "evaluate", "export", "adapter", "merge", "verify", "plan"},
    {"__init__"},
    {"benchmarks", "examples"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# what users import by `from torchrec_mdr import ...` comes from anywhere, and nothing in the package goes through it
PUBLIC = "__init__"


def room_of(path: Path, root: Path) -> str:
    """The room that a file is in: a folder or a file below the package, or benchmarks or examples beside it."""
    parts = path.relative_to(root).with_suffix("").parts
    return parts[1] if parts[0] == "torchrec_mdr" else parts[0]


def imported(source: str, path: Path, root: Path) -> set[str]:
    """The rooms that a file imports from."""
    here = path.relative_to(root).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join([*start, *(node.module or "").split(".")]).rstrip(".")
            modules = {p.stem for p in (root / "torchrec_mdr").iterdir() if p.suffix == ".py" or p.is_dir()}
            if base == "torchrec_mdr":  # `from torchrec_mdr import model` names a room, other names the public face
                found |= {f"{base}.{alias.name if alias.name in modules else PUBLIC}" for alias in node.names}
            else:
                found.add(base)
    rooms = set()
    for name in found:
        first, _, rest = name.partition(".")
        if first == "torchrec_mdr":
            rooms.add(rest.split(".")[0] or PUBLIC)
        elif first in ("benchmarks", "examples"):
            rooms.add(first)
    return rooms


def breaches(path: Path, root: Path) -> list[str]:
    """What a file imports and may not."""
    room, name = room_of(path, root), path.relative_to(root)
    if room not in FLOOR:
        return [f"{name}: room '{room}' is on no floor of tests/test_floors.py"]
    wrong = []
    for other in sorted(imported(path.read_text(), path, root) - {room}):
        if FLOOR.get(other, len(FLOORS)) >= FLOOR[room]:
            wrong.append(f"{name} imports {other}")
    return wrong


def files() -> list[Path]:
    return sorted(path for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "examples") for path in folder.rglob("*.py"))


def test_imports_go_down() -> None:
    assert [breach for path in files() for breach in breaches(path, ROOT)] == []


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_at_the_root_stand_the_commands_and_what_all_share() -> None:
    commands = {"train", "prepare", "predict", "evaluate", "export", "adapter", "merge", "verify", "plan"}
    shared = {"__init__", "model", "registry"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == commands | shared


@pytest.mark.parametrize("registry", [METHODS, BACKBONES, DATASETS, METRICS, HOOKS], ids=lambda r: r.kind)
def test_what_the_registry_names_is_there_and_has_that_name(registry: Registry) -> None:
    for name in registry:
        found = registry[name]
        assert registry.name_of(found) == name and found.__doc__
        room = found.__module__.split(".")[1]
        # a hook lies higher and is found by its name alone
        assert registry is HOOKS or FLOOR[room] < FLOOR["registry"], name


def test_a_paper_is_a_file_and_a_baseline_says_so() -> None:
    assert {path.stem for path in (PACKAGE / "methods").glob("*.py")} == {
        *("__init__", "base", "stage"),
        *("mlora", "multilora", "moe_mlora"),
    }
    for name in METHODS:
        assert METHODS[name].is_baseline == (METHODS[name].__module__.split(".")[1] == "baselines"), name


def test_the_library_draws_nothing() -> None:
    """A rank has no screen, and a foreign loop no launcher."""
    for path in files():
        names = {
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        used = {name.split(".")[0] for name in names} & {"matplotlib", "torchx"}
        rooms = {"matplotlib": {"report", "compare"}, "torchx": {"launch", "compare"}}
        for library in used:
            assert room_of(path, ROOT) in rooms[library], f"{path.relative_to(ROOT)} imports {library}"


def test_model_authors_see_no_compiled_code() -> None:
    compiled = {path.parent for suffix in ("cpp", "h") for path in PACKAGE.rglob(f"*.{suffix}")}
    assert compiled == {PACKAGE / "ops" / "csrc"}
    assert import_module("torchrec_mdr.ops.cpu_kernels").__doc__


@pytest.mark.parametrize(
    ("file", "statement", "is_wrong"),
    [
        ("torchrec_mdr/data/loader.py", "from torchrec_mdr.ops.groups import BatchDomains", False),
        ("torchrec_mdr/data/loader.py", "from torchrec_mdr.adapters.bank import LoRABank", True),
        ("torchrec_mdr/data/loader.py", "from . import schema", False),
        ("torchrec_mdr/data/loader.py", "from ..model import MultiDomainModel", True),
        ("torchrec_mdr/methods/mlora.py", "import torchrec_mdr.training.trainer", True),
        ("torchrec_mdr/methods/mlora.py", "from torchrec_mdr.registry import BACKBONES", True),
        ("torchrec_mdr/methods/mlora.py", "def f():\n    from torchrec_mdr.training import trainer", True),
        ("torchrec_mdr/model.py", "from torchrec_mdr.distributed import checkpoint", True),
        ("torchrec_mdr/training/trainer.py", "from torchrec_mdr.distributed import checkpoint", False),
        ("torchrec_mdr/training/trainer.py", "from torchrec_mdr.report.tables import domain_table", True),
        ("torchrec_mdr/training/trainer.py", "from torchrec_mdr import MultiDomainModel", True),
        ("torchrec_mdr/training/trainer.py", "from torchrec_mdr import model", False),
        ("torchrec_mdr/experiments/x.py", "from torchrec_mdr.compare.grid import Grid", True),
        ("torchrec_mdr/train.py", "from torchrec_mdr.training.trainer import Trainer", False),
        ("torchrec_mdr/training/trainer.py", "import benchmarks.timing", True),
        ("benchmarks/adapter.py", "from torchrec_mdr.model import MultiDomainModel", False),
        ("examples/own.py", "from torchrec_mdr import MultiDomainModel", False),
        ("torchrec_mdr/surprise.py", "import torch", True),
    ],
)
def test_the_guard_sees(tmp_path: Path, file: str, statement: str, is_wrong: bool) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "torchrec_mdr").mkdir(exist_ok=True)
    (tmp_path / "torchrec_mdr" / "model.py").touch()
    path.write_text(statement)
    assert bool(breaches(path, tmp_path)) == is_wrong
