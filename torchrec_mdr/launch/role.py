"""What a run asks of its launcher beyond TorchX's `dist.ddp`: to be started again, and warned before it is ended."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torchx import specs

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and Slurm's warning, which would end torchrun
WARNING_SECONDS = 60  # between a scheduler's warning and the end


@dataclass
class RunRole(specs.Role):
    """TorchX's role, which completes the request that a scheduler gets.

    Args:
        local_threads (int): threads of a process where the machine that launches is the one that trains; 0 leaves them.
    """

    local_threads: int = 0

    @classmethod
    def of(cls, role: specs.Role, local_threads: int) -> RunRole:
        """The same role, started again by torchrun and by the scheduler as often as its `max_retries` says."""
        made = cls(**{field.name: getattr(role, field.name) for field in fields(role)}, local_threads=local_threads)
        if made.max_retries:
            shell, command = made.args
            restarts = f"--max-restarts {made.max_retries} --signals-to-handle {SIGNALS}"
            made.args = [shell, command.replace("torchrun ", f"torchrun {restarts} ", 1)]
            made.env["MDR_RESUME"] = "auto"
        if made.min_replicas not in (None, made.num_replicas):
            # otherwise torchrun tells a node that comes later no address, and it waits in vain
            made.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return made

    def pre_proc(self, scheduler: str, dryrun_info: specs.AppDryRunInfo) -> specs.AppDryRunInfo:
        """TorchX calls it with the request, before it is shown or sent."""
        request = dryrun_info.request
        if scheduler == "local" and self.local_threads:
            for replica in request.role_params[self.name]:
                replica.env["OMP_NUM_THREADS"] = str(self.local_threads)
        if scheduler == "slurm" and self.max_retries:
            for replica in request.replicas.values():
                replica.sbatch_opts["signal"] = f"USR1@{WARNING_SECONDS}"
        if scheduler == "kubernetes" and self.max_retries:
            for task in request.resource["spec"]["tasks"]:
                task["template"].spec.termination_grace_period_seconds = WARNING_SECONDS
        return dryrun_info
