"""The forms of a training's state and of a study (merino_edge.training.state, study_runs). They need no PyTorch."""

from __future__ import annotations

from typing import Annotated, Any

from merino_edge import limits
from merino_edge.forms import UNSET, Count, Form, Line, Meta, Number, Positive, Sha256, UnsetType

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Step = Annotated[int, Meta(ge=1, le=limits.MAX_ITERATIONS)]


class Figures(Form):
    """What a training has measured so far."""

    validation_loss_before: Number
    validation_loss: Number
    train_seconds: Seconds
    history: list[tuple[Count, Number]]


class State(Form):
    """state.json."""

    file: Line
    file_sha256: Sha256
    step: Step
    architecture_id: Line
    corpus_sha256: Line
    start_sha256: Line | None
    config: dict[str, Any]  # merino_edge.training.config checks its fields
    figures: Figures
    teacher_sha256: Line | None = None


class Study(Form):
    """study.json."""

    space: Line | None
    architectures: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    seeds: Annotated[list[Annotated[int, Meta(ge=0, le=limits.MAX_SEED)]], Meta(min_length=1)]
    config: dict[str, Any]
    corpus_sha256: Line | UnsetType = UNSET
    names: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != len(self.architectures):
            raise ValueError(f"{len(self.names)} names for {len(self.architectures)} architectures")


class Trained(Form):
    """What a study reads of a finished training's training.json."""

    validation_loss: Positive
