"""What a stage starts from: its predecessor's checkpoint, another run's, or a file of the backbone's state."""

from __future__ import annotations

from torchrec_mdr.adapters.domain_module import DomainModule
from torchrec_mdr.distributed import checkpoint
from torchrec_mdr.distributed.backbone_state import backbone_state
from torchrec_mdr.distributed.environment import on_main
from torchrec_mdr.methods.stage import BACKBONE, EMBEDDINGS, Stage
from torchrec_mdr.storage import is_whole, isfile
from torchrec_mdr.training.experiment import Experiment
from torchrec_mdr.training.new_domains import check_divisions, load_with_new_domains, stored_groups
from torchrec_mdr.training.stage_runtime import StageRuntime
from torchrec_mdr.training.stored_banks import load_state


def load_start(path: str, stage: Stage, runtime: StageRuntime, experiment: Experiment) -> None:
    """Loads what a stage starts from; called by all ranks.

    Args:
        path (str): a stage's checkpoint, or a plain `state_dict` file of the backbone.
        stage (Stage): the one that starts.
        runtime (StageRuntime): its model.
        experiment (Experiment): whose divisions the checkpoint's have to be.

    Raises:
        ValueError: it is not there, or does not fit.
    """
    is_file, is_checkpoint = on_main(lambda: (isfile(path), is_whole(path)))
    if is_file:
        with backbone_state(runtime.model) as backbone:
            checkpoint.load_state_dict_file(path, backbone["model"])
        return
    if not is_checkpoint:
        raise ValueError(
            f"stage '{stage.name}' needs a checkpoint, but {path} does not exist; run the stage before it, or name "
            "one with --init_checkpoint"
        )
    load_stage(path, runtime, experiment)


def load_stage(path: str, runtime: StageRuntime, experiment: Experiment) -> None:
    """Loads a finished stage's checkpoint, also into more domains; see :func:`load_start`."""
    info = on_main(lambda: checkpoint.read_info(path, "groups", "divisions"))
    stored = stored_groups(path, info["groups"])
    state = runtime.state(stored)
    if stored <= {EMBEDDINGS, BACKBONE}:
        # tables without copies for the domains go into those with copies, too
        into_more = any(isinstance(module, DomainModule) and module.widens_tables for module in runtime.model.modules())
    else:
        into_more = check_divisions(path, info["divisions"], experiment.divisions, experiment.config.domains)
    if into_more:
        load_with_new_domains(runtime.model, path, state=state)
    else:
        load_state(path, runtime.model, state)
