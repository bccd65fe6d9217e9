"""Tables of one byte a number, adapters of two, and the rows that show what was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.inference.models import rows_for, trained
from tests.inference.runs import finished
from torchrec_mdr.inference import Scorer, export, writing
from torchrec_mdr.inference.bundle import INT8_BOUND, load_tensors
from torchrec_mdr.inference.freeze import ServingModel, freeze
from torchrec_mdr.inference.rebuild import shared_state
from torchrec_mdr.inference.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(
        tmp_path_factory.mktemp("run") / "run", "multilora", "--backbone=deepfm", "--auxiliary_division=gender"
    )


@torch.no_grad()
def test_a_byte_a_number_is_off_by_half_a_step_at_most() -> None:
    model = trained("mlora", "dlrm")
    frozen = freeze(model, ["a", "b", "c"])
    tables = frozen.backbone.sparse_arch.embedding_bag_collection
    rows = rows_for(model, 33)
    exact = tables(rows[1]).values()
    step = max(float((own.aminmax(dim=1)[1] - own.aminmax(dim=1)[0]).max()) / 255 for own in [tables.lookups[0].weight])
    tables.quantize()
    assert tables.lookups[0].weight.dtype is torch.uint8
    torch.testing.assert_close(tables(rows[1]).values(), exact, rtol=0, atol=0.5001 * step)
    assert not torch.equal(tables(rows[1]).values(), exact)


@pytest.mark.parametrize("given", [{"int8": True}, {"adapter_dtype": "bfloat16"}], ids=["int8", "bfloat16"])
def test_smaller_numbers_stay_within_the_stated_bound(run: Run, tmp_path: Path, given: dict) -> None:
    bundle = str(tmp_path / "bundle")
    export(run, bundle, compiled=False, **given)
    export(run, f"{bundle}32", compiled=False)
    dense, features, ids = rows_for(run.model, 256)
    small, whole = (Scorer(path, False).score(dense, features, ids).logits for path in (bundle, f"{bundle}32"))
    assert 0 < float((small - whole).abs().max()) <= INT8_BOUND
    largest = "backbone.safetensors" if "int8" in given else "adapters/scenario/cart/000001.safetensors"
    assert Path(bundle, largest).stat().st_size < Path(f"{bundle}32", largest).stat().st_size


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_a_lost_table_is_seen_when_a_bundle_is_opened(run: Run, tmp_path: Path, int8: bool) -> None:
    whole = str(tmp_path / "whole")
    export(run, whole, compiled=False, int8=int8)
    Scorer(whole)
    weights = [n for n in load_tensors(f"{whole}/backbone.safetensors") if "lookups" in n and n.endswith(".weight")]
    assert len(weights) == 2, "deepfm has two collections"
    scheme = json.loads(Path(whole, "schema.json").read_text())["sparse_features"]
    for name in weights:
        sizes = [own["num_embeddings"] + 1 for own in scheme]
        for place in range(len(sizes)):
            broken = tmp_path / f"{name}-{place}"
            shutil.copytree(whole, broken)
            state = load_tensors(f"{broken}/backbone.safetensors")
            start = sum(sizes[:place])
            own = [name] if not int8 else [name, name.replace("weight", "scale"), name.replace("weight", "offset")]
            for tensor in own:
                state[tensor][start : start + sizes[place]] = 0
            safetensors.torch.save_file(state, f"{broken}/backbone.safetensors")
            with pytest.raises(ValueError, match="does not give the golden rows' logits .* weights were lost"):
                Scorer(str(broken), False)


def test_a_bundle_that_loses_a_table_is_not_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(model: ServingModel) -> dict[str, torch.Tensor]:
        state = shared_state(model)
        return {
            name: torch.zeros_like(own) if name.endswith("lookups.0.weight") else own for name, own in state.items()
        }

    monkeypatch.setattr(writing, "shared_state", lossy)
    with pytest.raises(ValueError, match="does not give the golden rows' logits .* weights were lost"):
        export(run, str(tmp_path / "bundle"), compiled=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_for_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_mdr.inference import package

    here = package.this_machine()
    assert here["torch"] in torch.__version__ and here["machine"]
    for change, words in (
        ({"torch": "1.0.0"}, "was compiled for PyTorch 1.0.0, this one is 2"),
        ({"device": "cuda"}, "was compiled for the device cuda, this one is cpu"),
        ({"machine": "pdp11"}, "was compiled for machines pdp11, this one is "),
        (
            {"features": [*here["features"], "avx1024"]},
            "was compiled for processors with avx1024, which this one lacks",
        ),
    ):
        stored = json.dumps(here | change)
        monkeypatch.setattr(package, "_stored_machine", lambda path, stored=stored: stored)
        with pytest.raises(ValueError, match=f"{words}.*compile it anew by python -m torchrec_mdr.export --again"):
            package._check_machine("model.pt2")
    monkeypatch.setattr(package, "_stored_machine", lambda path: json.dumps(here | {"features": here["features"][:1]}))
    package._check_machine("model.pt2")  # a processor that has more
