"""A program without Python scores a bundle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.inference.runs import finished
from torchrec_mdr.inference import export
from torchrec_mdr.inference.bundle import GoldenRows, load_tensors

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "cpp"

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler; install g++")
    path = str(tmp_path_factory.mktemp("program") / "score")
    printed = subprocess.run([sys.executable, str(SOURCE / "cflags.py")], capture_output=True, text=True, check=True)
    subprocess.run(
        [compiler, "-std=c++20", "-O1", str(SOURCE / "score.cpp"), "-o", path, *printed.stdout.split()], check=True
    )
    return path


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("mlora", ["--backbone=dlrm_dcn"]),
        ("multilora", ["--backbone=mlp", "--backbone_options.batch_norm=true", "--auxiliary_division=gender"]),
        ("moe_mlora", ["--backbone=dlrm"]),
    ],
)
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_it_gives_pythons_logits(program: str, tmp_path: Path, method: str, given: list[str], int8: bool) -> None:
    bundle = str(tmp_path / "bundle")
    export(finished(tmp_path / "run", method, *given), bundle, int8=int8)
    # nothing of Python's is in its environment
    done = subprocess.run([program, bundle], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stderr) == (0, "")
    logits = torch.tensor([float(line) for line in done.stdout.split()])
    golden = GoldenRows.load(bundle)
    torch.testing.assert_close(logits, golden.logits, rtol=1e-6, atol=1e-6)
    assert golden.logits.std() > 0.01 and (golden.domains < 0).any()
    path = f"{bundle}/golden.safetensors"
    tensors = load_tensors(path)
    safetensors.torch.save_file(tensors | {"logits": tensors["logits"] + 1e-3}, path)
    assert subprocess.run([program, bundle], capture_output=True).returncode == 1
