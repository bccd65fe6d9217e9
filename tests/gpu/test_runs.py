"""The trainer on a GPU: sharded tables with fused Adam and NCCL, killed and resumed; where its steps wait."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.workload import build_runtime, click_schema, random_batches, training
from tests.test_train import SMALL, kill_at, same_result
from torchrec_mdr.data.schema import Division
from torchrec_mdr.distributed.environment import process_group
from torchrec_mdr.methods import MLoRA, MultiLoRA
from torchrec_mdr.registry import BACKBONES
from torchrec_mdr.train import main

STEPS = {"pretrain": (0, False), "adapt": (1, False), "joint": (0, True)}
# what sends ids to the tables' ranks has to know their number on the host
INPUT_DISTRIBUTION = {"start_sparse_data_dist", "wait_sparse_data_dist", "fill_pipeline", "_copy_batch_to_gpu"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_multilora_run_resumes_to_the_same_bits(precision: str, tmp_path: Path) -> None:
    arguments = [*SMALL, "--method=multilora", f"--precision={precision}", "--stages.fuse.validations_per_epoch=3"]
    arguments += ["--stages.pretrain.validations_per_epoch=3", "--backbone_options.batch_norm=true"]
    arguments += ["--embeddings.optimizer=adam", "--embeddings.sharding=table_wise"]
    assert main([*arguments, f"--output_dir={tmp_path / 'whole'}"]) == 0
    broken = tmp_path / "broken"
    kill_at("pretrain.progress", broken, arguments)
    kill_at("fuse.progress", broken, [*arguments, "--resume"])
    assert main([*arguments, f"--output_dir={broken}", "--resume"]) == 0
    same_result(tmp_path / "whole", broken, ("pretrain", "adapt_scenario", "adapt_segment", "fuse"))


def waits(stage_number: int, joint: bool) -> list[str]:
    """Where a few steps of a stage wait for the device, outside TorchRec's input distribution."""
    found = []

    def note(message: Warning | str, *_: object) -> None:
        stack = traceback.extract_stack()
        if "synchronizing CUDA" in str(message) and not INPUT_DISTRIBUTION & {frame.name for frame in stack}:
            own = [frame for frame in stack if "torchrec" in frame.filename]
            found.append(f"{own[-1].filename}:{own[-1].lineno} {own[-1].line}" if own else str(message))

    divisions = (Division("scenario", 20), Division("segment", 3))
    method = MultiLoRA(schedule="joint") if joint else MLoRA()
    schema = click_schema(10_000, 5, 3, divisions if joint else divisions[:1])
    batches = [batch.pin_memory() for batch in random_batches(schema, 1024, 6)]
    for batch in batches:
        batch.sparse_features.sync()
    with process_group() as environment:
        model = BACKBONES["dlrm"](hidden=(64, 32)).build(schema, 16)
        stage = method.stages(schema.divisions)[stage_number]
        run = training(build_runtime(model, method, schema.divisions, stage, "adam", 16, environment), batches)
        run()
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.parametrize("name", STEPS)
def test_steps_wait_for_nothing_but_the_input_distribution(name: str) -> None:
    assert waits(*STEPS[name]) == []
