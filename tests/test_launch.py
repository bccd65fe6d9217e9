from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from pprint import pformat
from typing import Any

import pytest
from packaging.requirements import Requirement
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.specs import AppDef

from torchx_components import mdr

ROOT = Path(__file__).resolve().parents[1]
COMPONENT = "torchx_components/mdr.py:train"


class TestComponent(ComponentTestCase):
    def test_train_is_a_valid_component(self) -> None:
        self.validate(mdr, "train")


def only_role(app: AppDef) -> Any:
    (role,) = app.roles
    return role


def test_script_arguments_reach_the_training_module() -> None:
    role = only_role(mdr.train("--method", "mlora", "--output_dir", "my runs/1", j="1x2"))
    assert role.args[-1].endswith(
        "--nproc_per_node 2 --tee 0 --role '' -m torchrec_mdr.train --method mlora --output_dir 'my runs/1'"
    )
    assert role.num_replicas == 1


def dry_run(app: AppDef, scheduler: str) -> Any:
    """The request that a scheduler would get."""
    settings = {"local_cwd": {}, "slurm": {"partition": "p"}, "kubernetes": {"queue": "q"}}[scheduler]
    with get_runner() as runner:
        return runner.dryrun(app, scheduler, settings).request


@pytest.mark.parametrize(
    ("options", "here", "elsewhere"),
    [
        ({"j": "1x1"}, 8, 1),
        ({"j": "1x2"}, 4, 1),
        ({"j": "2x1"}, 4, 1),
        ({"j": "2x3"}, 1, 1),
        ({"j": "1x16"}, 1, 1),
        ({"j": "2x2", "cpu": 12}, 6, 6),
        ({"j": "1x2", "env": {"OMP_NUM_THREADS": "3"}}, 3, 3),
    ],
)
def test_the_cores_are_shared_out_to_the_processes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], here: int, elsewhere: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    app = mdr.train(**options)
    assert dry_run(app, "local_cwd").role_params["train"][0].env["OMP_NUM_THREADS"] == str(here)
    assert dry_run(app, "slurm").replicas["train-0"].env["OMP_NUM_THREADS"] == str(elsewhere)


@pytest.mark.parametrize(("options", "cores"), [({"j": "2x2"}, 2), ({"j": "1x4"}, 4), ({"j": "2x2", "cpu": 6}, 6)])
def test_other_machines_are_asked_for_a_core_a_process(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], cores: int
) -> None:
    """And not for as many as the machine has that submits."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert f"#SBATCH --job-name=train-0 --requeue --partition=p --ntasks-per-node=1 --cpus-per-task={cores} " in str(
        dry_run(mdr.train(**options), "slurm")
    )


def test_a_number_of_threads_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert dry_run(mdr.train(), "local_cwd").role_params["train"][0].env["OMP_NUM_THREADS"] == "5"


RESTARTS = "torchrun --max-restarts 3 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --rdzv_backend c10d "


def test_retries_reach_torchrun_and_each_scheduler() -> None:
    app = mdr.train("--method", "mlora", j="2x1", max_retries=3)
    for replica in dry_run(app, "local_cwd").role_params["train"]:
        assert replica.args[-1].startswith(RESTARTS) and replica.env["MDR_RESUME"] == "auto"
    script = str(dry_run(app, "slurm"))
    assert script.count(RESTARTS) == script.count("MDR_RESUME=auto") == script.count("--signal=USR1@60") == 2
    assert script.count("--requeue") == 2 and "export TORCHX_MAX_RETRIES=3" in script


def test_an_elastic_run_tells_nodes_that_come_later_where_to_meet() -> None:
    variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert only_role(mdr.train(j="1:2x2", max_retries=3)).env[variable] == "1"
    assert variable not in only_role(mdr.train(j="2x2", max_retries=3)).env


def test_without_retries_nothing_is_started_again() -> None:
    app = mdr.train("--method", "mlora", j="2x1")
    for scheduler in ("local_cwd", "slurm", "kubernetes"):
        request = str(dry_run(app, scheduler))
        assert not any(
            word in request for word in ("max-restarts", "MDR_RESUME", "--signal", "GracePeriod", "RestartJob")
        )


def test_the_callers_environment_stays_as_it_was() -> None:
    env = {"A": "1"}
    assert only_role(mdr.train(env=env)).env["A"] == "1"
    assert env == {"A": "1"}


def test_two_runs_meet_on_different_ports() -> None:
    ports = {only_role(mdr.train(j="2x1")).port_map["c10d"] for _ in range(2)}
    assert len(ports) == 2
    assert only_role(mdr.train(j="2x1", rdzv_port=29500)).port_map["c10d"] == 29500


def unwrapped(printed: str) -> str:
    """Joins the strings that pprint has broken over lines."""
    return re.sub(r"['\"]\s*\n\s*['\"]", "", printed)


@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm", "kubernetes"])
def test_dry_run(monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    app = mdr.train("--method", "mlora", j="2x4", cpu=8, gpu=4, memMB=65536, env={"A": "1"})
    request = unwrapped(pformat(dry_run(app, scheduler), width=1000))
    for part in ("torchrun", "--nnodes 2 --nproc_per_node 4", "-m torchrec_mdr.train --method mlora"):
        assert part in request
    assert re.search(r"OMP_NUM_THREADS\W+(value\W+)?2\b", request)


def torchx(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would, from the project's root, with the environment's programs on PATH."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(["torchx", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_the_plain_line_is_a_local_run() -> None:
    run = torchx("run", "--dryrun", COMPONENT, "--", "--method", "mlora")
    assert run.returncode == 0, run.stderr
    request = unwrapped(run.stdout.split("SCHEDULER REQUEST")[1])
    assert "-m torchrec_mdr.train --method mlora" in request and "'cwd'" in request


@pytest.mark.parametrize("j", ["1x2", "2x1"])
def test_two_processes_meet(j: str) -> None:
    run = torchx("run", COMPONENT, "-j", j, "-m", "tests.launch_probe", "--", "--method", "a b")
    assert run.returncode == 0, run.stderr
    threads = max((os.cpu_count() or 1) // 2, 1)
    assert run.stderr.count(f"probe: sum 3 of 2, threads {threads}, args ['--method', 'a b']") == 2


def test_a_failed_run_ends_with_an_error() -> None:
    run = torchx("run", COMPONENT, "-j", "1x2", "-m", "tests.launch_probe", "--", "--fail")
    assert run.returncode == 1
    assert "probe: failed as asked" in run.stderr


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))
    return {requirement.name: requirement for requirement in parsed}


def test_the_stack_is_the_same_with_a_gpu_and_without() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    gpu = requirements(project["optional-dependencies"]["cuda"])
    cpu = requirements((ROOT / "requirements-cpu.txt").read_text().splitlines())
    (pin,) = re.findall(r"--no-deps (torchrec==\S+)", (ROOT / "Makefile").read_text())
    assert pin in (ROOT / "requirements-cpu.txt").read_text()
    cpu["torchrec"] = Requirement(pin)
    cpu["fbgemm-gpu"] = cpu.pop("fbgemm-gpu-cpu")
    assert set(cpu) - {"tensordict", "torchmetrics", "pyre-extensions", "tqdm"} == set(gpu)
    for name, requirement in gpu.items():
        (version,) = [specifier.version for specifier in cpu[name].specifier]
        assert requirement.specifier.contains(version), name


def test_a_plain_install_brings_no_build_of_the_stack() -> None:
    """On a machine without a GPU it would be the CUDA build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = set(requirements(project["dependencies"]))
    assert not plain & {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"}
    assert not plain & {"polars", "matplotlib", "jinja2"}, "who only wants modules need not have them"


def test_the_project_names_all_compiled_sources() -> None:
    """What it does not name is missing in a source distribution, which then installs without kernels, silently."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    named = {path for module in modules for path in [*module["sources"], *module.get("depends", [])]}
    paths = (ROOT / "torchrec_mdr").rglob("*")
    there = {str(path.relative_to(ROOT)) for path in paths if path.suffix in (".cpp", ".h")}
    assert named == there and len(there) == 6
