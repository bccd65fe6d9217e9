"""What the README shows works as it stands there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_snippet_runs_and_the_wrapped_model_equals_the_dlrm() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before_wrapping, wrapping = code.split("model = MultiDomainModel", 1)
    names: dict[str, Any] = {}
    exec(before_wrapping, names)  # noqa: S102
    plain = copy.deepcopy(names["dlrm"])
    dense = torch.rand(2, 4)
    exec("model = MultiDomainModel" + wrapping, names)  # noqa: S102
    model, items = names["model"], names["items"]
    assert names["logits"].shape == (2, 1)
    assert torch.equal(model(dense, items, torch.tensor([0, 11])), plain(dense, items))


def test_options_and_methods_that_it_names_exist() -> None:
    from torchrec_mdr.registry import BACKBONES, DATASETS, METHODS

    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*) \|$", README, re.MULTILINE))
    for option, known in (("method", METHODS), ("backbone", BACKBONES), ("dataset", DATASETS)):
        named = [w for w in re.findall(r"`([a-z0-9_\-]+)`", rows[option]) if not w.startswith("--")]
        assert set(named) <= set(known), f"README names an unknown {option}"
    assert set(re.findall(r"`([a-z0-9_]+)`", rows["backbone"])) == set(BACKBONES)


def test_the_matrix_of_methods_and_backbones_is_the_codes() -> None:
    from torchrec_mdr.compare.compatibility import method_backbone_matrix

    assert method_backbone_matrix() in README
