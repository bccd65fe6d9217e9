"""The door to files: what reads or writes them goes through `torchrec_mdr.storage`, which knows object stores, too."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "torchrec_mdr"

# modules whose functions touch files, whatever they are called
MODULES = {"shutil", "glob", "tempfile", "fcntl", "mmap"}
FUNCTIONS = {
    *("open", "io.open", "gzip.open", "bz2.open", "lzma.open", "np.memmap"),
    *(f"os.{name}" for name in ("replace", "rename", "remove", "unlink", "listdir", "scandir", "walk", "makedirs")),
    *(f"os.{name}" for name in ("mkdir", "rmdir", "stat", "open", "link", "symlink", "utime", "access", "fsync")),
    *(f"os.path.{name}" for name in ("exists", "lexists", "isfile", "isdir", "islink", "getsize", "getmtime")),
}
# of pathlib's paths
METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "rmdir", "unlink", "touch"),
    *("exists", "is_file", "is_dir", "iterdir", "rglob", "stat"),
}

# what may touch files without the door, and why
ALLOWED: dict[str, dict[str, str]] = {
    "compare/launchers.py": {"open": "logs of processes, written on this machine while they run"},
    "compare/reports.py": {".exists": "whether there is a clone with its commit"},
    "data/cache.py": {
        "os.rename": "a folder on disk gets its name when it is whole; a store has data/upload.py",
        "os.stat": "a source file's size and time name its prepared data, as they always did",
    },
    "data/datasets/staged_rows.py": {"os.mkdir": "rows laid aside in a scratch folder"},
    "data/importing/prepare.py": {
        "os.rename": "a folder on disk gets its name when it is whole; a store has data/upload.py",
        "os.rmdir": "the empty folder that it takes the place of",
    },
    "data/importing/staging.py": {".mkdir": "rows laid aside in a scratch folder"},
    "data/owners.py": {"open": "/proc"},
    "data/record_batches.py": {"tempfile.TemporaryDirectory": "batches of one process, for its own time"},
    "data/table_files.py": {
        "glob.glob": "globs on disk; those of a store are matched here",
        "glob.has_magic": "looks at a text",
        "os.walk": "folders on disk; those of a store are listed by the door",
    },
    "data/table_faults.py": {"open": "a local copy, as text", "gzip.open": "the same"},
    "data/text_scan.py": {"gzip.open": "unpacks what the door has opened"},
    "distributed/checkpoint_writer.py": {
        name: "a checkpoint on disk gets its name when it is whole; one in a store counts from its digests on"
        for name in "glob.escape glob.glob os.listdir os.makedirs os.path.isdir os.rename shutil.rmtree".split()
    },
    "distributed/environment.py": {"open": "/proc", ".read_text": "/sys"},
    "distributed/stored_rows.py": {
        "open": "the head of a local copy",
        "np.memmap": "rows of a local copy, of which few are read",
        "mmap.mmap": "the same",
        "mmap.MADV_DONTNEED": "the same",
    },
    "inference/export.py": {"os.rename": "a bundle on disk gets its name when whole; in a store its manifest counts"},
    "inference/writing.py": {"os.rename": "the same"},
    "training/tuning.py": {"tempfile.TemporaryDirectory": "trials, which nobody reads afterwards"},
}


def touches(source: str) -> set[str]:
    """The names in a file that touch files without the door."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in {*MODULES, "os", "os.path"}:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.alias) and node.name == "path_manager":
            found.add(node.name)
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node)
            if name in FUNCTIONS or (name.split(".")[0] in MODULES and "." in name):
                found.add(name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            if ast.unparse(node.func.value) not in ("storage", "os", "os.path"):
                found.add(f".{node.func.attr}")
    return found


def outside() -> dict[str, set[str]]:
    """What each file of the package touches, storage apart."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "storage")
    found = {str(path.relative_to(PACKAGE)): touches(path.read_text()) for path in paths}
    return {name: calls for name, calls in found.items() if calls}


def test_files_are_touched_through_the_door() -> None:
    found = {name: calls - ALLOWED.get(name, {}).keys() for name, calls in outside().items()}
    others = {name: sorted(calls) for name, calls in found.items() if calls}
    assert not others, f"use torchrec_mdr.storage, or say why not in ALLOWED: {others}"


def test_what_is_allowed_is_used() -> None:
    found = outside()
    stale = {name: calls.keys() - found.get(name, set()) for name, calls in ALLOWED.items()}
    assert not {name: calls for name, calls in stale.items() if calls}


def test_the_guard_sees_what_it_is_to_see() -> None:
    source = (
        "import os, shutil\nfrom pathlib import Path\nfrom torchrec_mdr.storage import path_manager\n"
        "with open('a') as file: os.replace('a', 'b')\nshutil.rmtree('c')\nos.path.isfile('d')\n"
        "from os import rename\nPath('e').write_text('')\ntext.replace('f', 'g')\nself.context.open(state)\n"
        "storage.exists('h')\n"
    )
    seen = {"path_manager", "open", "os.replace", "shutil.rmtree", "os.path.isfile", "os.rename", ".write_text"}
    assert touches(source) == seen
