"""What opening the process group does to the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from torchrec_mdr.distributed.environment import process_group
from torchrec_mdr.train import main

PAGES_TAKEN_AGAIN = """
import ctypes
import resource
import torch
from torchrec_mdr.distributed.environment import process_group

def steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(size * 100_000) for size in (5, 40, 60, 120)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages, which some machines give, cost few faults
{opened}:
    steps()
    print(steps())
"""


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
@pytest.mark.skipif(torch.cuda.is_available(), reason="of training on CPU")
def test_a_step_takes_no_pages_that_the_step_before_gave_back() -> None:
    faults = []
    for opened in ("with process_group()", "if True"):
        code = PAGES_TAKEN_AGAIN.format(opened=opened)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        faults.append(int(done.stdout))
    assert faults[0] < 1000 < 10_000 < faults[1]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "given",
    [{}, {"WORLD_SIZE": ""}, {"MASTER_ADDR": "10.255.255.1"}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}],
    ids=str,
)
def test_a_world_of_one_needs_no_address(given: dict[str, str], variables: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    hook = sys.excepthook
    with process_group() as environment:
        assert (environment.rank, environment.world_size, dist.get_world_size()) == (0, 1, 1)
    assert sys.excepthook is hook  # or else later tracebacks of the process name a rank


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("RANK=1", "RANK=1 is set, but WORLD_SIZE is not; start by torchrun"),
        ("RANK=1 WORLD_SIZE=", "RANK=1 is set, but WORLD_SIZE is not"),
        ("RANK=5 WORLD_SIZE=1", "RANK=5 is no rank of WORLD_SIZE=1: ranks are 0 to 0"),
        ("RANK=0 WORLD_SIZE=2", "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT are not set; start by torchrun"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost", "WORLD_SIZE=2, but MASTER_PORT is not set"),
        ("WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", "WORLD_SIZE=2, but RANK is not set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=99999", "MASTER_PORT=99999 is no port"),
        ("RANK=first WORLD_SIZE=2", "RANK=first in the environment must be a whole number, at least 0"),
        ("WORLD_SIZE=0", "WORLD_SIZE=0 in the environment must be a whole number, at least 1"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1 in the environment must be a whole number"),
    ],
)
def test_variables_that_describe_no_group_are_refused(
    given: str, words: str, variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in given.split():
        variables.setenv(*variable.split("=", 1))
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1
