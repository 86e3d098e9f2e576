"""The forms of a latency table's lines, and of a table inside another artefact (merino_edge.latency.table_file)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from merino_edge import limits
from merino_edge.forms import UNSET, Count, Form, Line, Meta, Number, Paragraph, Positions, Positive, Text, UnsetType

Milliseconds = Annotated[float, Meta(ge=-1e9, le=1e9)]  # a part too small for the clock can have a negative time
SomeMilliseconds = Annotated[float, Meta(ge=1e-9, le=1e9)]
Energy = Annotated[float, Meta(ge=0, le=1e12)]
Coefficient = Annotated[float, Meta(ge=-1e12, le=1e12)]
Precision = Literal["fp32", "fp16", "int8", "int4"]  # merino_edge.storage
Index = Annotated[int, Meta(ge=0, le=1_000)]
Size = Annotated[int, Meta(ge=0, le=limits.MAX_POSITIONS)]


# --- the header ------------------------------------------------------------------------------------


class Family(Form):
    """The architecture's fields that a table holds constant."""

    head_dim: Annotated[int, Meta(ge=1, le=limits.MAX_HEAD_DIM)]
    tied_head: bool
    norm: Line
    norm_placement: Line
    positions: Line
    rotary_dim: Size
    bias: Line
    parallel_residual: bool
    qk_norm: Line | UnsetType = UNSET
    attention_cap: Annotated[float, Meta(ge=0, le=1e6)] | UnsetType = UNSET
    ffn: Line | UnsetType = UNSET
    kv_group: Size | UnsetType = UNSET


class Reference(Form):
    """Where the star of layers has its centre."""

    ffn: Line
    ratio: Positive
    decode: Positions
    prefill: Positions


class Device(Form):
    """What is read of a device card; its other fields are only printed."""

    name: Line | UnsetType = UNSET
    power_mode: Line | UnsetType = UNSET
    compatible: list[Line] | UnsetType = UNSET


class Transferred(Form, rename={"source": "from"}):
    """The full table that a short one follows."""

    source: Line
    sha256: Line
    device: Line
    precision: Line
    estimated: bool
    measured: Count
    entries: Count


class CompactHeader(Form):
    """What of the first line is kept of a table inside another artefact."""

    family: Family
    precision: Precision
    default_length: Positions
    estimated: bool
    cache_buckets: Size | UnsetType = UNSET
    reference: Reference | UnsetType = UNSET
    device: Device | UnsetType = UNSET
    transferred: Transferred | None = None


class Header(CompactHeader):
    """The first line. Its hash was checked before."""

    backend: Line | UnsetType = UNSET
    target: Line | UnsetType = UNSET
    runtime: Line | UnsetType = UNSET
    runtime_basis: Paragraph | UnsetType = UNSET
    minutes: Number | UnsetType = UNSET
    also: list[Line] | UnsetType = UNSET
    unverified: list[Paragraph] | UnsetType = UNSET
    checked_by: list[Paragraph] | UnsetType = UNSET
    libraries: dict[str, Any] | UnsetType = UNSET
    space: dict[str, Any] | UnsetType = UNSET


# --- the other lines -------------------------------------------------------------------------------


class Entry(Form):
    """A measurement. The columns of its kind are checked where it is read (merino_edge.latency.measurement)."""

    what: Line
    mode: Literal["decode", "prefill"]
    length: Positions
    chosen_by: Line | None = None
    visit: Count = 0
    ffn: Line | UnsetType = UNSET
    cache: Literal["warm", "cold"] = "warm"
    failed: Text = ""
    unit: Literal["ms"] | UnsetType = UNSET
    samples: tuple[Milliseconds, ...] = ()
    yardsticks: dict[Line, SomeMilliseconds] | UnsetType = UNSET
    energy_mj: Energy | None = None
    transferred: bool = False


class Steps(Form):
    """The step-time model."""

    faces: Annotated[list[tuple[Coefficient, Coefficient, Coefficient]], Meta(min_length=1, max_length=1_000)]
    alternatives: Annotated[
        list[Annotated[list[Index], Meta(min_length=1, max_length=1_000)]], Meta(min_length=1, max_length=1_000)
    ]

    def __post_init__(self) -> None:
        if any(index >= len(self.faces) for indices in self.alternatives for index in indices):
            raise ValueError(f"an alternative has a face beyond the {len(self.faces)} there are")


class FacesLine(Form):
    decode: Steps


class OtherLoad(Form):
    of_measured: Number
    of_all: Number
    busiest: tuple[tuple[Paragraph, Number], ...] = ()


class Conditions(Form):
    """What the sensors said before, during or after the profile."""

    moved: tuple[Paragraph, ...] = ()
    other_load: OtherLoad | None = None


class ErrorFigures(Form):
    """What stands of the errors of any models."""

    mape_percent: Number | None = None
    p95_percent: Number | None = None
    max_percent: Number | None = None
    kendall_tau: Number | None = None
    low_percent: Number | None = None
    high_percent: Number | None = None


class FoundErrors(ErrorFigures):
    """The errors on models that searches found."""

    models: Count
    bias_percent: Number


class Errors(ErrorFigures):
    """The errors of one mode; {} where nothing could be compared."""

    models: Count | UnsetType = UNSET
    bias_percent: Number | None = None
    visits_apart_percent: Number | None = None
    found: FoundErrors | None = None


class VerdictForm(Form):
    word: Literal["good", "usable", "do not use"]
    reasons: Annotated[list[Paragraph], Meta(max_length=100)]


class Validation(Form):
    """The last line. A version that gave no verdict left it out."""

    decode: Errors | UnsetType = UNSET
    prefill: Errors | UnsetType = UNSET
    verdict: VerdictForm | None = None


# --- inside another artefact -----------------------------------------------------------------------


class Compact(Form):
    """A table without samples. An entry is [what, mode, length, shape, ms, energy, cache]; older ones end before."""

    name: Line
    sha256: Line
    header: CompactHeader
    entries: list[Annotated[list[Any], Meta(min_length=5, max_length=7)]]
    faces: Steps | UnsetType = UNSET
    validation: Validation | UnsetType = UNSET
    verdict: VerdictForm | None = None
