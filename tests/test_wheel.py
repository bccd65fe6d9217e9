"""The package as a stranger installs it: a wheel, built in one fresh environment and installed in another."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--dataset_options.rows=6000", "--stages.pretrain.epochs=1", "--stages.adapt.epochs=1"]

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean |= {"PIP_RETRIES": "10", "PIP_DEFAULT_TIMEOUT": "60"}  # an index may be slow now and then
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the CPU stack, and then the wheel, as README has it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    run("git", "clone", "-q", ROOT, source, cwd=folder)
    for name in ("build", "use"):
        venv.create(folder / name, with_pip=True)
    pip = "-m", "pip", "-q", "--disable-pip-version-check"
    run(folder / "build/bin/python", *pip, "wheel", "--no-deps", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("torchrec_mdr-*.whl")
    python = folder / "use/bin/python"
    run(python, *pip, "install", "-r", source / "requirements-cpu.txt", cwd=folder)
    run(python, *pip, "install", "--no-deps", "torchrec==1.8.0", cwd=folder)
    run(python, *pip, "install", wheel, cwd=folder)
    return folder / "use/bin"


def test_it_brings_neither_a_cuda_build_nor_what_only_comparisons_need(bin_folder: Path, tmp_path: Path) -> None:
    listed = run(bin_folder / "python", "-m", "pip", "list", "--format=json", cwd=tmp_path)
    installed = {package["name"].lower().replace("_", "-") for package in json.loads(listed.splitlines()[0])}
    assert {"torchrec-mdr", "fbgemm-gpu-cpu", "torchx"} <= installed
    assert not installed & {"fbgemm-gpu", "polars", "matplotlib", "aiohttp", "scikit-learn"}
    assert not any(name.startswith("nvidia-") for name in installed)


def test_it_has_the_compiled_code_its_types_and_its_version(bin_folder: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata, pathlib, torchrec_mdr\n"
        "from torchrec_mdr.ops import _adam, _rows\n"
        "folder = pathlib.Path(torchrec_mdr.__file__).parent\n"
        "assert (folder / 'py.typed').exists() and (folder / 'ops/_rows.pyi').exists()\n"
        "assert importlib.metadata.version('torchrec-mdr') == torchrec_mdr.__version__"
    )
    run(bin_folder / "python", "-c", code, cwd=tmp_path)


def test_it_trains_from_an_empty_folder_and_hides_no_component(bin_folder: Path, tmp_path: Path) -> None:
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    command = ["run", "-s", "local_cwd", "mdr.train", "--", "--method", "mlora", *TINY, "--output_dir", "run"]
    said = run(bin_folder / "torchx", *command, cwd=tmp_path, PATH=path, MDR_CACHE=str(tmp_path / "cache"))
    assert "compiled kernels are missing" not in said
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["method"] == "mlora" and metrics["test"]["rows"] == 600
    builtins = run(bin_folder / "torchx", "builtins", cwd=tmp_path, PATH=path)
    assert "mdr.train" in builtins and "dist.ddp" in builtins and "utils.echo" in builtins


def test_without_a_compiler_it_installs_and_says_so(bin_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    run("git", "clone", "-q", ROOT, source, cwd=tmp_path)
    python, target = bin_folder / "python", tmp_path / "target"
    command = ["-m", "pip", "install", "-q", "--no-deps", "--target", target, source]
    run(python, *command, cwd=tmp_path, CC="/bin/false", CXX="/bin/false")
    assert not list(target.rglob("*.so"))
    said = run(python, "-m", "torchrec_mdr.train", *TINY, cwd=tmp_path, PYTHONPATH=str(target))
    assert "compiled kernels are missing" in said and "install a C++ compiler" in said
