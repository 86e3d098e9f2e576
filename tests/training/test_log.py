"""The log of a training: the same figures in log.jsonl and in TensorBoard's files, each step once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merino_edge.errors import OutputError
from merino_edge.training.log import LOG, TrainingLog
from merino_edge.training.train import Progress


def progress(step: int, folder: Path, loss: float) -> Progress:
    return Progress(step, loss, 1e-3, 0.5, 100.0, loss + 1, folder)


def test_tensorboard_has_each_step_once_after_a_training_went_on(tmp_path: Path) -> None:
    board = tmp_path / "board"
    with TrainingLog(tmp_path, 5, 0, board) as log:
        for step in (1, 2, 3, 4):
            log.record(progress(step, tmp_path, float(step)), 10 * step, mfu=0.25)
    with TrainingLog(tmp_path, 5, 2, board) as log:  # it went on from the state after step 2
        for step in (3, 4, 5):
            log.record(progress(step, tmp_path, 10.0 * step), 10 * step, mfu=None)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    losses = {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}
    assert {line["step"]: line["loss"] for line in lines} == losses and len(lines) == 5
    read = EventAccumulator(str(board))
    read.Reload()
    assert {event.step: event.value for event in read.Scalars("loss")} == losses
    assert [event.step for event in read.Scalars("validation_loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in read.Scalars("mfu")] == [1, 2]  # None is not drawn


def test_a_file_in_the_place_of_its_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "board").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        TrainingLog(tmp_path, 5, 0, tmp_path / "board")
    assert (tmp_path / "board").read_text() == "mine"
