"""What the launch tests run in place of training: an all-reduce over the ranks. `--fail` fails on the last rank."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    size, threads = dist.get_world_size(), os.environ["OMP_NUM_THREADS"]
    # one string, so that the lines of several ranks do not mix
    print(f"probe: sum {total.item():.0f} of {size}, threads {threads}, args {sys.argv[1:]}\n", end="", flush=True)
    if "--fail" in sys.argv and dist.get_rank() == size - 1:
        sys.exit("probe: failed as asked")
    dist.destroy_process_group()
