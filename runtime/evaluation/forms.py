"""The form of a report of `evaluate`, as far as a later run is compared with it. It needs no harness."""

from __future__ import annotations

from typing import Annotated

from merino_edge.forms import UNSET, Form, Line, Meta, Number, Text, UnsetType

Nats = Annotated[float, Meta(ge=-1e15, le=1e15)]
Units = Annotated[float, Meta(gt=0, le=1e15)]  # words, bytes or tokens
Count = Annotated[int, Meta(ge=1, le=2**53)]
PAIRED = ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")  # [sum of log p, units] an item


class Metric(Form):
    value: Number
    stderr: Number | None


class Task(Form):
    items_sha256: Line
    metrics: dict[Line, Metric]
    per_item: dict[Line, Annotated[list[Number | tuple[Nats, Units]], Meta(min_length=1)]]

    def __post_init__(self) -> None:
        for metric, items in self.per_item.items():
            if {isinstance(item, tuple) for item in items} != {metric in PAIRED}:
                raise ValueError(f"the items of {metric} have another form")


class OfText(Form):
    """The entry of a text's perplexity."""

    text_sha256: Line
    stride: Count
    tokens: Count
    words: Count
    bytes: Count
    per_window: Annotated[list[tuple[Nats, Count]], Meta(min_length=1)]


class Report(Form):
    tasks: dict[Text, Task]
    perplexity: OfText | UnsetType = UNSET
