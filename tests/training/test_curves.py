"""Curves: no step twice after an interruption, and no run that ends for their sake."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrec_mdr.training.curves import Curves


def draw(folder: Path, steps: range, purge_step: int | None) -> None:
    curves = Curves(str(folder), purge_step)
    for step in steps:
        curves.add_scalar("loss", step, step)
    curves.close()


@pytest.mark.parametrize("saved", [None, 4])
def test_what_comes_after_the_checkpoint_is_drawn_once(saved: int | None, tmp_path: Path) -> None:
    first = 0 if saved is None else saved + 1
    draw(tmp_path, range(1, 8), 0)
    for number, path in enumerate(tmp_path.iterdir()):  # files are read in the order of their names, by seconds
        path.rename(path.with_name(f"events.out.tfevents.{number}"))
    draw(tmp_path, range(max(first, 1), 10), first)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    with caplog.at_level(logging.WARNING):
        draw(tmp_path / "file" / "events", range(3), None)
    (record,) = [one for one in caplog.records if one.name.endswith("curves")]
    assert str(tmp_path / "file" / "events") in record.getMessage()
