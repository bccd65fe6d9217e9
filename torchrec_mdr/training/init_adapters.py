"""Adapters that start from those of an earlier run, by their domains' names, on the same backbone or a newer one."""

from __future__ import annotations

from typing import Any

from torchrec_mdr.adapters.context import Route
from torchrec_mdr.adapters.expert_gate import OWN_ALONE
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.environment import on_every, on_main
from torchrec_mdr.methods.stage import ADAPTERS, GATE, Stage
from torchrec_mdr.storage import is_whole
from torchrec_mdr.training.new_domains import load_with_new_domains, stored_groups
from torchrec_mdr.training.stage_runtime import StageRuntime
from torchrec_mdr.training.stage_trainer import StageTrainer


def init_adapters(
    path: str, stage: Stage, runtime: StageRuntime, fit: StageTrainer, natural: Division
) -> dict[str, Any] | None:
    """Loads what a stage trains, adapters or a gate, from a checkpoint of an earlier run's stage; called by all ranks.

    Domains that the checkpoint does not know start anew. The backbone stays what it is.

    Args:
        path (str): the checkpoint.
        stage (Stage): the stage that begins.
        runtime (StageRuntime): its model, with the backbone loaded.
        fit (StageTrainer): evaluates it.
        natural (Division): the run's natural division.

    Returns:
        dict | None: what the old adapters are worth on this backbone, `auc` on validation rows beside
        `auc_without_adapters`; None where the stage has nothing to take from there.

    Raises:
        ValueError: no such checkpoint, or one of another division or of adapters of other shapes.
    """
    if not on_main(lambda: is_whole(path)):
        raise ValueError(f"--init_adapters {path} does not exist; name a folder checkpoints/STAGE of an earlier run")
    info = on_main(lambda: checkpoint.read_info(path, "groups", "divisions"))
    stored = stored_groups(path, info["groups"]) & {ADAPTERS, GATE}
    if not stored:
        raise ValueError(f"--init_adapters {path} holds no adapters; name the checkpoint of a stage that trains some")
    if stage.trains_backbone or not stage.trains & stored:
        return None
    if next(iter(info["divisions"])) != natural.name:
        raise ValueError(
            f"--init_adapters {path} has adapters of division '{next(iter(info['divisions']))}', this run trains those "
            f"of '{natural.name}'; choose the same division"
        )
    state = runtime.state(stage.trains & stored)
    known = on_every(lambda: checkpoint.stored_sizes(path))
    if not all(name in known for name in state if name.endswith(OWN_ALONE)):  # of a gate that could not fall back
        state = {name: tensor for name, tensor in state.items() if not name.endswith(OWN_ALONE)}
        runtime.model.leave_start()
    load_with_new_domains(runtime.model, path, state=state)
    without = fit.evaluate("validation", Route.BASE, stage.division).auc
    auc = fit.evaluate("validation", stage.route, stage.division).auc
    if auc is not None and without is not None:
        fit.say(
            f"validation AUC {auc:.4f} with the adapters of {path} on this backbone, {without:.4f} without adapters"
        )
    return {"checkpoint": path, "auc": auc, "auc_without_adapters": without}
