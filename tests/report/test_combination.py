from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from torchrec_mdr.report.combination import draw_combination
from torchrec_mdr.training.combination import Combination


def test_one_picture_a_layer_whatever_the_names_hold(tmp_path: Path) -> None:
    names = ("$1_to_$5", "a\nb", "ö ✓", "")
    means = {"backbone.over_arch.hidden.0": np.eye(4, 2), "$x_1_2$": np.full((4, 2), np.nan)}
    path = tmp_path / "combination.png"
    draw_combination(Combination(means, names, ("$\\frac$", "b")), "$\\bad$", str(path))
    one = Combination({"a": np.eye(4, 2)}, names, ("a", "b"))
    draw_combination(one, "t", str(tmp_path / "one.png"))
    height, width, _ = imread(path).shape
    assert width == 2 * imread(tmp_path / "one.png").shape[1] and height > 200
