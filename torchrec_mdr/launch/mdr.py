"""The TorchX component that launches a training run, on one machine or many."""

# no "from __future__ import annotations" and no "X | None" here: TorchX reads the parameters' types as they stand
import os
import socket
from typing import Dict, List, Optional

import torchx
import torchx.specs as specs
from torchx.components import dist

from torchrec_mdr.launch.role import RunRole


def train(
    *script_args: str,
    j: str = "1x1",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    m: str = "torchrec_mdr.train",
    name: str = "mdr/",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 0,
    rdzv_backend: str = "c10d",
    mounts: Optional[List[str]] = None,
    debug: bool = False,
    tee: int = 0,
) -> specs.AppDef:
    """
    Trains a multi-domain recommender: `torchx run mdr.train -j 1x2 -- --method mlora`.

    Args:
        script_args: options of `python -m torchrec_mdr.train`, after `--`
        j: {nodes}x{processes per node}
        cpu: cores per node; 0 asks for one a process, and takes all of this machine's on local_cwd
        gpu: GPUs per node
        memMB: memory per node in MB
        h: a registered named resource, instead of cpu, gpu and memMB
        m: the module to run
        name: {experiment}/{run}, either may be left out
        image: container image, for schedulers that use one
        env: environment variables of the processes (A=1,B=2)
        max_retries: how often torchrun, and then the scheduler, may start a failed run again; it goes on where it was
        rdzv_port: port on the first node where several nodes meet; 0 takes one that is free on this machine
        rdzv_backend: rendezvous backend of several nodes
        mounts: mounts of the container (type=bind,src=/host,dst=/job[,readonly])
        debug: set PyTorch's debug environment variables
        tee: output to copy with the process's rank in front of each line (0 none, 1 stdout, 2 stderr, 3 both)
    """
    _, nodes, processes, _ = dist.parse_nnodes(j)
    env = dict(env or {})
    threads = env.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    local_threads = 0 if cpu or h or threads else max((os.cpu_count() or 1) // nodes // processes, 1)
    cpu = cpu or processes  # not this machine's: it may be a login node
    cores = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h).cpu
    # torchrun would give each of several processes one thread, however many cores there are
    env["OMP_NUM_THREADS"] = threads or str(max(cores // processes, 1))
    with socket.socket() as probe:  # inside, since TorchX takes every function here for a component
        probe.bind(("", 0))
        free_port = int(probe.getsockname()[1])
    app = dist.ddp(
        *script_args,
        m=m,
        name=name,
        image=image,
        j=j,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port or free_port,
        rdzv_backend=rdzv_backend,
        mounts=mounts,
        debug=debug,
        tee=tee,
    )
    app.roles = [RunRole.of(role, local_threads) for role in app.roles]
    return app
