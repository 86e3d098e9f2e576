"""The form of the demo's state (merino_edge.cli.demo_steps)."""

from __future__ import annotations

from typing import Any

from merino_edge.forms import UNSET, Form, Line, Number, Text, UnsetType


class Step(Form):
    """A step that began; one with `made` has ended."""

    key: Line | UnsetType = UNSET
    made: dict[Text, Line | None] | UnsetType = UNSET
    result: dict[str, Any] | UnsetType = UNSET
    other_load: Number | None = None

    def __post_init__(self) -> None:
        if (self.made is UNSET) != (self.result is UNSET):
            raise ValueError("a step has ended without a result, or has one before its end")


class State(Form):
    steps: dict[Line, Step]
