"""What opening the process group does to the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

PAGES_TAKEN_AGAIN = """
import resource
import torch
from torchrec_mdr.distributed.environment import process_group

def steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(size * 100_000) for size in (5, 40, 60, 120)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{opened}:
    steps()
    print(steps())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
@pytest.mark.skipif(torch.cuda.is_available(), reason="of training on CPU")
def test_a_step_takes_no_pages_that_the_step_before_gave_back() -> None:
    faults = []
    for opened in ("with process_group()", "if True"):
        code = PAGES_TAKEN_AGAIN.format(opened=opened)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        faults.append(int(done.stdout))
    assert faults[0] < 1000 < 10_000 < faults[1]
