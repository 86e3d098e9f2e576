"""The forms of a bundle's manifest and of the entries of engines and tunings in it (merino_edge.bundle)."""

from __future__ import annotations

from typing import Any

from merino_edge.forms import UNSET, Count, Form, Line, Number, Positions, UnsetType


class File(Form):
    sha256: Line
    bytes: Count


class Check(Form):
    """A line of the parity report."""

    check: Line
    value: Number
    limit: Number | None
    passed: bool


class Graph(Form):
    lowering: Line | UnsetType = UNSET
    opset: Count | UnsetType = UNSET
    cache: Line | UnsetType = UNSET


class Machine(Form):
    """What is read of the device card that an engine was built on."""

    name: Line | UnsetType = UNSET
    power_mode: Line | UnsetType = UNSET


class Engine(Form):
    """A compiled engine, in a bundle or in the engine store."""

    file: Line | UnsetType = UNSET
    library: Line | UnsetType = UNSET
    version: Line | UnsetType = UNSET
    capability: Line | UnsetType = UNSET
    machine: Machine | UnsetType | None = UNSET
    precision: Line | UnsetType = UNSET
    context: Positions | UnsetType = UNSET
    bytes: Count | UnsetType = UNSET
    onnx_sha256: Line | UnsetType = UNSET
    graph_sha256: Line | UnsetType = UNSET
    plan_sha256: Line | UnsetType = UNSET
    peak_memory_bytes: Count | UnsetType = UNSET


class Tuning(Form):
    cpu: Line | UnsetType = UNSET
    cores: Count | UnsetType = UNSET
    threads: Any = UNSET  # merino_edge.runtime.thread_tuning reads those of this machine
    spinning: Any = UNSET


class Manifest(Form):
    """manifest.json, as far as a bundle is read; other fields are only printed."""

    files: dict[Line, File]
    architecture: dict[str, Any]
    precision: Line
    target: Line
    context: Positions
    contexts: list[Positions] | UnsetType = UNSET
    graph: Graph | None = None
    parity: tuple[Check, ...] = ()
    engines: tuple[Engine, ...] = ()
    tunings: tuple[Tuning, ...] = ()
