"""Check a search result by its certificate. This file needs Python and NumPy, and nothing else of merino-edge.

    python check_certificate.py [--score FILE.py:NAME] RESULT.json

It is written from docs/certificate.md, whose sections have the same names as the parts of this file. It derives every
score and cost again, from the space, the budgets and the table inside the result. Then it proves the bound again, from
the prices in the certificate. `merino-edge verify` runs the same check.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Key = tuple[Any, ...]

VERSION = 1  # of the certificate
NOT_HERE = "-"  # a task whose models are in other classes
TOLERANCE = 1e-9  # share of a score within which two scores count as equal
ROUNDING = 1e-12  # share of a bound's magnitude that is added to it, because rounding may have lowered it
STATED = 1e-8  # share within which a bound must be what the certificate states
HIGHEST_PRICE = 1e100  # so that no product of a price and a cost overflows
EXACT = 2.0**53  # multiples of a grid up to so many add up without rounding
MAX_BYTES = 64 * 2**20
MAX_PARTIAL_MODELS = 3_000_000
CHUNK = 1_000_000  # partial models extended at a time


class Refused(Exception):
    """The claim of a result does not follow, or it cannot be derived again. The message is one line.

    It may quote the file, so what could steer a terminal is replaced.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


class NotAllowed(Refused):
    """The result names a program as its score, which nobody allowed to run."""


# --- 1. the file -----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The result in a file. Raises Refused where it is no JSON object or does not match its own hash."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"it is larger than {MAX_BYTES} bytes")
        document = json.loads(path.read_text("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"it is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise Refused("it is no JSON object")
    return document


def canonical_hash(value: Any) -> str:
    """The sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_envelope(document: dict[str, Any]) -> None:
    """Check kind, version and hash of the file, and the version of the certificate."""
    if document.get("kind") != "architecture" or document.get("schema_version") != 1:
        raise Refused("it is no search result of schema 1")
    body = {key: value for key, value in document.items() if key != "sha256"}
    if canonical_hash(body) != document.get("sha256"):
        raise Refused("it does not match its own sha256, so it was altered")
    certificate = document.get("certificate")
    if not isinstance(certificate, dict):
        raise Refused("it has no certificate")
    if certificate.get("bound") is None:
        raise Refused("its certificate claims no bound, so there is nothing to check")
    version = certificate.get("version")
    if version != VERSION:
        told = "has no proof" if version is None else f"has version {version!r}"
        raise Refused(f"its certificate {told}; this checker reads version {VERSION}")


def require(condition: object, message: str) -> None:
    """Raise Refused with `message` unless the condition holds."""
    if not condition:
        raise Refused(message)


def whole(value: Any, what: str, low: int = 1, high: int = 1_048_576) -> int:
    """`value` if it is a whole number in the range."""
    require(type(value) is int and low <= value <= high, f"{what} is {value!r}, not a whole number {low} to {high}")
    return int(value)


def finite(value: Any, what: str) -> float:
    """`value` if it is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(number and math.isfinite(value), f"{what} is {value!r}, not a finite number")
    return float(value)


# --- 2. the space ----------------------------------------------------------------------------------

DIMENSIONS = (
    *("blocks", "widths", "ffn_ratios", "layers", "kv_groups", "shared", "ffn", "embedding_widths"),
    *("vocabularies", "contexts"),
)
MODEL = (
    *("head_dim", "tied_head", "norm", "norm_placement", "norm_epsilon", "positions", "position_offset"),
    *("rotary_dim", "rotary_base", "bias", "parallel_residual"),
)
LATER = {  # fields of the model that are left out at these values
    "qk_norm": "none",
    "rotary_factors": [],
    "local_rotary_base": 0.0,
    "attention_cap": 0.0,
    "logit_cap": 0.0,
}
FFN, GATED_FFN = ("relu", "gelu", "gelu_tanh", "relu_squared"), ("swiglu", "geglu", "geglu_tanh")


class Block(NamedTuple):
    """A block choice. `precision` and `lost` are its own where the space opens precisions."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    shared: bool
    window: int = 0  # positions that its layers attend to; 0: all
    precision: str | None = None
    lost: float = 0.0  # share of its score that rounding costs

    def form(self) -> dict[str, Any]:
        """The block as an architecture states it."""
        return {name: getattr(self, name) for name in self._fields[: 7 if self.window else 6]}

    @property
    def weight_layers(self) -> int:
        return 1 if self.shared else self.layers


class Template(NamedTuple):
    """What all blocks of a model share."""

    ffn: str
    vocabulary: int  # its index
    embedding_width: int
    context: int


class Space:
    """All templates and block choices, in order."""

    def __init__(self, form: dict[str, Any]) -> None:
        known = {"name", "model", "least_width", "least_embedding", *DIMENSIONS}
        require(
            set(form) - {"precisions", "windows"} == known,
            f"the space has other fields than this checker knows: {sorted(set(form) ^ known)}",
        )
        require(
            set(form["model"]) - set(LATER) == set(MODEL), "the space's model has other fields than this checker knows"
        )
        self.model: dict[str, Any] = form["model"]
        listed = {name: form[name] if isinstance(form[name], list) else [form[name]] for name in DIMENSIONS}
        for name in ("blocks", "widths", "layers", "kv_groups", "embedding_widths", "contexts"):
            numbers = [whole(n, name) for n in listed[name]]
            require(numbers and numbers == sorted(set(numbers)), f"{name} do not ascend")
        ratios = [finite(r, "ffn_ratios") for r in listed["ffn_ratios"]]
        require(ratios and ratios == sorted(set(ratios)) and ratios[0] > 0, "ffn_ratios do not ascend")
        require(
            all(type(s) is bool for s in listed["shared"]) and len(set(listed["shared"])) == len(listed["shared"]),
            "shared lists other values than false and true",
        )
        require(
            set(listed["ffn"]) <= {*FFN, *GATED_FFN} and len(set(listed["ffn"])) == len(listed["ffn"]),
            "unknown FFN kind",
        )
        windows = form.get("windows", 0)
        windows = [whole(w, "windows", low=0) for w in (windows if isinstance(windows, list) else [windows])]
        require(windows and windows == sorted(set(windows)), "windows do not ascend")
        self.vocabularies: list[dict[str, Any]] = listed["vocabularies"]
        sizes = [whole(v["size"], "vocabulary") for v in self.vocabularies]
        require(sizes == sorted(set(sizes)), "vocabularies do not ascend")
        per_token = [v["bytes_per_token"] for v in self.vocabularies if v["bytes_per_token"] is not None]
        require(all(2**-10 <= finite(n, "bytes_per_token") <= 2**10 for n in per_token), "no token has so many bytes")
        self.widths: list[int] = listed["widths"]
        self.block_counts: list[int] = listed["blocks"]
        self.contexts: list[int] = listed["contexts"]
        self.least = finite(form["least_width"], "least_width"), finite(form["least_embedding"], "least_embedding")
        head_dim = whole(self.model["head_dim"], "head_dim")
        own = [(p["name"], finite(p["lost"], "lost")) for p in form.get("precisions", [])]
        require(all(0 <= lost <= 1 for _, lost in own) and len(dict(own)) == len(own), "a precision twice, or its loss")
        self.precisions = [name for name, _ in own]
        choices = []
        for width in self.widths:
            heads = width // head_dim
            groups = [g for g in listed["kv_groups"] if heads % g == 0]
            require(heads * head_dim == width and groups, f"width {width} does not go with its heads")
            parts = itertools.product(listed["ffn_ratios"], listed["layers"], groups, listed["shared"], windows)
            for ratio, layers, group, shared, window in parts:
                require(width * ratio == int(width * ratio), f"width {width} with FFN ratio {ratio}")
                if not (shared and layers == 1 and len(listed["shared"]) > 1):
                    shape = (width, layers, heads, heads // group, int(width * ratio), shared, window)
                    choices += [Block(*shape, *of) for of in own or [(None, 0.0)]]
        # By width, then by layers: the choices of a cell stand together.
        self.choices = sorted(choices, key=lambda b: (b.width, b.layers))
        self.templates = [
            Template(*fields)
            for fields in itertools.product(listed["ffn"], range(len(sizes)), listed["embedding_widths"], self.contexts)
        ]
        self.width_of = np.array([self.widths.index(b.width) for b in self.choices])
        self.layers_of = np.array([b.layers for b in self.choices])
        self.depths = range(
            self.block_counts[0] * min(listed["layers"]), self.block_counts[-1] * max(listed["layers"]) + 1
        )
        require(self.depths.stop <= 1025 and len(choices) <= 50_000 and len(self.templates) <= 10_000, "too large")

    def allowed(self, template: Template) -> list[int]:
        """The indices of the widths that a block may have."""
        e, (width_share, embedding_share) = template.embedding_width, self.least
        return [i for i, w in enumerate(self.widths) if w >= width_share * e and w * embedding_share <= e]

    def fields(self, template: Template, blocks: Sequence[Block]) -> dict[str, Any]:
        """An architecture in the form that a result states it."""
        own = {
            "vocab_size": self.vocabularies[template.vocabulary]["size"],
            "max_positions": template.context,
            "embedding_width": template.embedding_width,
            "ffn": template.ffn,
        }
        return {**self.model, **own, "blocks": [block.form() for block in blocks]}

    def size(self) -> int:
        """The number of architectures."""
        count = np.bincount(self.width_of, minlength=len(self.widths)).tolist()
        total = 0
        for template in self.templates:
            ways = dict.fromkeys(self.allowed(template), 1)  # to go on after width w
            for n in range(1, self.block_counts[-1] + 1):
                ways = {w: sum(count[x] * ways[x] for x in ways if x >= w) for w in ways}
                total += ways[min(ways)] if n in self.block_counts else 0
        return total


def plain(fields: dict[str, Any]) -> Any:
    """An architecture's form as an object with the same fields."""
    blocks = tuple(
        SimpleNamespace(**{"window": 0, **b}, weight_layers=1 if b["shared"] else b["layers"]) for b in fields["blocks"]
    )
    rows = fields["max_positions"] + fields["position_offset"] if fields["positions"] == "learned" else 0
    return SimpleNamespace(
        **{**LATER, **fields, "blocks": blocks},
        gated=fields["ffn"] in GATED_FFN,
        position_rows=rows,
        layers=sum(block.layers for block in blocks),
    )


# --- 3. counts -------------------------------------------------------------------------------------

FLOPS_SEQUENCE = 1024


def matrix_elements(m: Any, b: Any) -> int:
    kv_width = b.kv_heads * m.head_dim
    return int(2 * b.width * (b.width + kv_width) + (3 if m.gated else 2) * b.width * b.ffn_width)


def norm_elements(m: Any, width: int) -> int:
    return width * (2 if m.norm == "layernorm" else 1)


def layer_norm_elements(m: Any, b: Any) -> int:
    heads = {"none": 0, "head": 2, "width": b.heads + b.kv_heads}[m.qk_norm]
    return int((4 if m.norm_placement == "both" else 2) * norm_elements(m, b.width) + heads * m.head_dim)


def vector_elements(m: Any, b: Any) -> int:
    total = layer_norm_elements(m, b)
    if m.bias != "none":
        total += b.width + 2 * b.kv_heads * m.head_dim
    if m.bias == "all":
        total += 2 * b.width + (2 if m.gated else 1) * b.ffn_width
    return int(total)


def projection(before: int, after: int) -> int:
    return before * after if before != after else 0


def block_parameters(m: Any, b: Any) -> int:
    return int(b.weight_layers * (matrix_elements(m, b) + vector_elements(m, b)))


def block_flops(m: Any, b: Any) -> int:
    layer = 2 * FLOPS_SEQUENCE * matrix_elements(m, b) + 4 * FLOPS_SEQUENCE * FLOPS_SEQUENCE * b.width
    return int(b.layers * layer)


def end_parameters(m: Any, first: int, last: int) -> int:
    total = m.vocab_size * m.embedding_width * (1 if m.tied_head else 2) + m.position_rows * first
    total += projection(m.embedding_width, first) + projection(last, m.embedding_width)
    return int(total + (norm_elements(m, last) if m.norm_placement != "post" else 0))


class Form(NamedTuple):
    """How a matrix is stored: bits, and the inputs that share a 2-byte scale; 0: a row does, None: there is none."""

    bits: int
    inputs: int | None = None

    def bytes(self, rows: int, inputs: int) -> float:
        scales = 0.0 if self.inputs is None else rows * inputs / self.inputs if self.inputs else rows
        return rows * inputs * self.bits / 8 + scales * 2


class Target(NamedTuple):
    """How a target stores numbers."""

    tensorrt: bool
    native: bool  # whether attention is TensorRT's own, with the primitive graph beside it; not at fp32
    half: bool = True  # the cache is float16
    half_biases: bool = True
    ort: bool = False  # whether its graphs hold ONNX Runtime's attention


TARGETS = {
    None: Target(tensorrt=False, native=False, half_biases=False),
    "onnxruntime": Target(tensorrt=False, native=False, half=False, half_biases=False, ort=True),
    "onnxruntime-cuda": Target(tensorrt=False, native=False, ort=True),
    "jetpack-6.2": Target(tensorrt=True, native=False),
    "jetpack-7.1": Target(tensorrt=True, native=False),
    "jetpack-7.2": Target(tensorrt=True, native=True),
    "tensorrt-11": Target(tensorrt=True, native=True),
    "rtx": Target(tensorrt=True, native=True),
}
PRECISIONS = ("fp32", "fp16", "int8", "int4")


class Storage:
    """The bytes of a model's parts at one precision for one target."""

    def __init__(self, precision: str, name: str | None) -> None:
        require(precision in PRECISIONS, f"precision {precision!r} is unknown")
        require(name in TARGETS, f"this checker does not know how target {name!r} stores numbers")
        require(name != "onnxruntime-cuda" or precision != "fp32", f"{name} has no fp32")
        target = TARGETS[name]
        half, quantised = precision != "fp32", precision in ("int8", "int4")
        floats = Form(16 if half else 32)
        self.matrix = self.embedding = self.head = self.positions = floats
        if quantised:
            bits = int(precision[3:])
            self.matrix = Form(bits, 0 if bits == 8 and target.tensorrt else 32)
            self.head = Form(8, 0)
            self.embedding = floats if target.tensorrt else self.head
        self.bias_bytes = 2 if half and target.half_biases else 4
        self.cache_bytes = 2 if half and target.half else 4
        self.splits_table = quantised and target.tensorrt
        self.native = target.native and half
        self.ort, self.named, self.gives_back = target.ort, name is not None, name == "onnxruntime"

    def block(self, m: Any, b: Any) -> float:
        kv_width, matrix = b.kv_heads * m.head_dim, self.matrix.bytes
        total = matrix(b.width + 2 * kv_width, b.width) + matrix(b.width, b.width)
        total += matrix((2 if m.gated else 1) * b.ffn_width, b.width) + matrix(b.width, b.ffn_width)
        norms = layer_norm_elements(m, b)
        return float(b.weight_layers * (total + norms * 4 + (vector_elements(m, b) - norms) * self.bias_bytes))

    def change(self, before: int, after: int) -> float:
        return self.matrix.bytes(after, before) if before != after else 0.0

    def table(self, m: Any) -> float:
        return int(self.head.bytes(m.vocab_size, m.embedding_width))

    def ends(self, m: Any, first: int, last: int) -> float:
        total = self.embedding.bytes(m.vocab_size, m.embedding_width) + self.positions.bytes(m.position_rows, first)
        if self.splits_table or not m.tied_head:
            total += self.head.bytes(m.vocab_size, m.embedding_width)
        total += self.change(m.embedding_width, first)
        total += self.change(last, m.embedding_width)
        total += m.max_positions * self._position(m)
        return float(total + (norm_elements(m, last) * 4 if m.norm_placement != "post" else 0))

    def _position(self, m: Any) -> int:
        """Bytes that graphs hold for each position: cosines and sines of its angles, and its number."""
        if not self.named:
            return 0
        primitive = 2 * m.head_dim if m.rotary_dim else 0
        angles = m.rotary_dim if self.ort else primitive + (m.rotary_dim if self.native else 0)
        return int(angles * self.cache_bytes + (0 if self.ort else 8))

    def cache(self, m: Any, b: Any, positions: int) -> int:
        return int(2 * b.layers * b.kv_heads * m.head_dim * positions * self.cache_bytes)

    def kept(self, m: Any, b: Any, positions: int) -> int:
        """Bytes of the cache that stay: ONNX Runtime's CPU engine gives back what is 128 positions behind a window."""
        gives_back = b.window and self.gives_back
        return self.cache(m, b, min(positions, b.window + 128) if gives_back else positions)


class Held:
    """The bytes of a model's parts as ONNX Runtime's CPU engine holds them."""

    def __init__(self, precision: str) -> None:
        bits = {"int8": 8, "int4": 4}.get(precision, 0)
        self.quantised = bits > 0
        self.element = bits / 8 + 12 / 32 if bits else 4.0
        self.widened = 5 / 8 if precision == "fp16" else 0.0  # of a layer of each block, held again while it loads

    def block(self, m: Any, b: Any) -> float:
        stored = matrix_elements(m, b) * self.element + vector_elements(m, b) * 4
        return float(b.weight_layers * stored + b.layers * 136_000)

    def change(self, before: int, after: int) -> float:
        return projection(before, after) * self.element

    def ends(self, m: Any, first: int, last: int) -> float:
        width, table = m.embedding_width, m.vocab_size * m.embedding_width
        held = table + 12 * table / min(width & -width, 256) if self.quantised else 4.0 * table
        held += self.change(width, first)
        held += self.change(last, width)
        return float(held + m.max_positions * m.rotary_dim * 4 + 11_000_000)


def activation_bytes(m: Any, b: Any, tokens: int) -> int:
    kv_width = b.kv_heads * m.head_dim
    attention = 2 * b.width + 2 * (b.width + 2 * kv_width) + b.heads * m.max_positions
    ffn = 2 * b.width + (3 if m.gated else 1) * b.ffn_width
    return int(tokens * max(attention, ffn) * 4)


def end_activation_bytes(m: Any, tokens: int) -> int:
    return int(max(tokens * 2 * m.embedding_width, m.embedding_width + m.vocab_size) * 4)


# --- 4. the latency table --------------------------------------------------------------------------

FAMILY = (*("head_dim", "tied_head", "norm", "norm_placement", "positions", "rotary_dim", "bias", "parallel_residual"),)
LAYER = ("ffn", "width", "heads", "kv_heads", "ffn_width")
NO_LAYER = ("", 0)  # of parts that have neither an FFN nor a window
COLUMNS = {
    "layer": LAYER,
    "repeat": LAYER,
    "width_change": ("before", "after"),
    "end": ("vocab_size", "embedding_width"),
}


class Step(NamedTuple):
    """A question to the table, by one piece of the step-time model."""

    mode: str
    length: int
    unit: str = "ms"
    piece: int = 0

    @property
    def fitted(self) -> bool:
        return (self.mode, self.unit) == ("decode", "ms")


def rounded(value: float) -> float:
    """The nearest multiple of 2^-30."""
    return round(value / 2.0**-30) * 2.0**-30


def layer_point(length: int, width: int, heads: int, kv_heads: int, ffn_width: int) -> Key:
    return length, width**2, ffn_width / width, (kv_heads - 1) / (heads - 1) if heads > 1 else 1.0


class Grid:
    """Costs by coordinates, monotone where no combination is missing."""

    def __init__(self, points: dict[Key, float]) -> None:
        self.axes = [sorted(set(axis)) for axis in zip(*points, strict=True)]
        shape = [len(axis) for axis in self.axes]
        self.complete = len(points) == math.prod(shape)
        self.points = points
        if self.complete:
            order = sorted(points)
            above = np.array([points[at] for at in order]).reshape(shape)
            below = above
            for axis in range(len(shape)):
                above = np.maximum.accumulate(above, axis)
                below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
            self.points = dict(zip(order, ((above + below) / 2).ravel().tolist(), strict=True))

    def at(self, point: Key) -> float:
        """The multilinear interpolation."""
        corners: list[tuple[float, Key]] = [(1.0, ())]
        for axis, x in zip(self.axes, point, strict=True):
            require(axis[0] <= x <= axis[-1], f"the table does not reach {x}")
            index = bisect.bisect_left(axis, x)
            high = axis[index]
            if high == x:
                ends = [(1.0, high)]
            else:
                t = (x - axis[index - 1]) / (high - axis[index - 1])
                ends = [(1 - t, axis[index - 1]), (t, high)]
            corners = [(weight * part, (*at, value)) for weight, at in corners for part, value in ends]
        require(all(at in self.points for _, at in corners), "the table has a hole")
        return sum(weight * self.points[at] for weight, at in corners)


class Table:
    """The latency table inside a result."""

    def __init__(self, form: dict[str, Any], space: Space, precision: str, pieces: dict[str, Any] | None) -> None:
        header = form["header"]
        for name in FAMILY:
            require(header["family"][name] == space.model[name], f"the table has another {name} than the space")
        of_table, of_space = ({**LATER, **values} for values in (header["family"], space.model))
        same = of_table["qk_norm"] == of_space["qk_norm"]
        require(same, "the table has another qk_norm than the space")
        same = (of_table["attention_cap"] == 0) == (of_space["attention_cap"] == 0)
        require(same, "only one of table and space has an attention_cap")
        self.stored = Storage(precision, None)
        self.default_length = whole(header["default_length"], "default_length")
        self.cache_bucket = header.get("cache_buckets")
        lines = []
        for what, mode, length, shape, ms, *more in form["entries"]:
            energy, cache = more[0] if more else None, more[1] if len(more) > 1 else "warm"
            require(mode in ("decode", "prefill") and cache in ("warm", "cold"), "the table has an unknown entry")
            numbers = [whole(shape[name], name) for name in COLUMNS[what] if name != "ffn"]
            kind = (shape.get("ffn", ""), whole(shape.get("window", 0), "window", low=0) if "ffn" in shape else 0)
            at: Key = () if mode == "decode" else (whole(length, "length"),)
            if what == "width_change":
                at = (*at, numbers[0] * numbers[1])
            elif what == "end":
                at = (*at, *numbers)
            else:
                at = layer_point(length, *numbers)
            if energy is not None:
                energy = finite(energy, "energy")
                require(energy >= 0, "an energy is negative")
            costs = {"ms": max(0.0, finite(ms, "a time")), "mj": energy}
            lines.append((length, what, mode, kind, cache, at, shape.get("heads", 1), costs))
        lines.sort(key=lambda line: line[0])
        points: dict[Key, dict[Key, float]] = {}
        for _, what, mode, kind, cache, at, _, costs in lines:
            for unit, cost in costs.items():
                if cost is not None:
                    points.setdefault((unit, what, mode, kind, cache), {})[at] = cost
        shares = {at[-1] for _, what, *_, at, heads, _ in lines if what in ("layer", "repeat") and heads > 1}
        for _, what, mode, kind, cache, at, heads, _ in lines:
            if what in ("layer", "repeat") and heads == 1:  # a single head stands for every share
                for unit in ("ms", "mj"):
                    grid = points.get((unit, what, mode, kind, cache), {})
                    if at in grid:
                        grid.update({(*at[:-1], share): grid[at] for share in shares})
        if (reference := header.get("reference")) is not None:
            kinds = itertools.product(("ms", "mj"), ("layer", "repeat"), ("decode", "prefill"), ("warm", "cold"))
            for unit, what, mode, cache in kinds:
                by_kind = {k[3]: p for k, p in points.items() if (*k[:3], k[4]) == (unit, what, mode, cache)}
                for kind, values in _filled(by_kind, reference, mode).items():
                    points[unit, what, mode, kind, cache] = values
        grids = {key: Grid(values) for key, values in points.items()}
        self.grids = {key: grid for key, grid in grids.items() if key[0] == "ms" or grid.complete}
        only_cold = {key[4] for key in self.grids if key[2] == "decode"} == {"cold"}
        model = pieces or {"faces": [[float(only_cold), 0.0, 0.0]], "alternatives": [[0]]}
        self.pieces = [tuple(finite(x, "a piece") for x in piece) for piece in model["faces"]]
        require(all(share >= 0 and per_mb >= 0 for share, per_mb, _ in self.pieces), "a piece makes a part cost less")
        self.alternatives = [[self.pieces[i] and i for i in indices] for indices in model["alternatives"]]
        require(self.alternatives and all(self.alternatives), "the step-time model has no pieces")
        self._windows = {key[3][1] for key in self.grids}
        self._cache: dict[Key, float] = {}

    def steps(self, step: Step) -> list[list[Step]]:
        """A cost is the least over these lists of the largest of their sums."""
        if not step.fitted:
            return [[step]]
        return [[step._replace(piece=i) for i in indices] for indices in self.alternatives]

    def positions(self, step: Step, context: int) -> int:
        bucket = self.cache_bucket
        if step.mode == "prefill" or bucket is None:
            return step.length
        while 0 < bucket < step.length:
            bucket *= 2
        return int(min(bucket or context, context))

    def _cost(self, what: str, kind: tuple[str, int], step: Step, point: Key) -> float:
        share = self.pieces[step.piece][0] if step.fitted else 0.0
        key = (what, kind, step.mode, step.unit, share, point)
        if key not in self._cache:
            if what == "repeat" and step.mode == "prefill":
                what = what if any(k[:3] == (step.unit, what, step.mode) for k in self.grids) else "layer"
            warm, cold = (self.grids.get((step.unit, what, step.mode, kind, c)) for c in ("warm", "cold"))
            grids = [warm, cold] if share and warm and cold else [warm or cold]
            require(grids[0] is not None, f"the table has no {what} in {step.mode}")
            values = [grid.at(point) for grid in grids if grid is not None]
            if len(values) == 2:
                values[0] += share * max(0.0, values[1] - values[0])
            self._cache[key] = rounded(values[0])
        return self._cache[key]

    def _reading(self, step: Step, count: float) -> float:
        """What it costs to read so many bytes."""
        per_mb = self.pieces[step.piece][1] if step.fitted else 0.0
        return rounded(per_mb * count / 1e6) if per_mb else 0.0

    def block(self, m: Any, b: Any, step: Step) -> float:
        length = self.positions(step, m.max_positions)
        point = layer_point(length, b.width, b.heads, b.kv_heads, b.ffn_width)
        kind = (m.ffn, b.window if b.window < length and b.window in self._windows else 0)
        first = self._cost("layer", kind, step, point)
        read = self._reading(step, self.stored.block(m, b) + self.stored.cache(m, b, min(length, b.window or length)))
        if b.shared and b.layers > 1:
            return float(read + first + (b.layers - 1) * self._cost("repeat", kind, step, point))
        return float(read + b.layers * first)

    def change(self, before: int, after: int, step: Step) -> float:
        if before == after:
            return 0.0
        length = () if step.mode == "decode" else (step.length,)
        cost = self._cost("width_change", NO_LAYER, step, (*length, before * after))
        return cost + self._reading(step, before * after * self.stored.matrix.bytes(1, 1))

    def ends(self, m: Any, first: int, last: int, step: Step) -> float:
        length = () if step.mode == "decode" else (step.length,)
        cost = self._cost("end", NO_LAYER, step, (*length, m.vocab_size, m.embedding_width))
        cost += self._reading(step, self.stored.table(m))
        cost += rounded(self.pieces[step.piece][2]) if step.fitted else 0.0
        out = step._replace(mode="decode")  # only the last position reaches the head
        return cost + self.change(m.embedding_width, first, step) + self.change(last, m.embedding_width, out)


def _filled(by_kind: dict[Key, dict[Key, float]], reference: dict[str, Any], mode: str) -> dict[Key, dict[Key, float]]:
    """The grids of layers by (FFN kind, window), completed around the table's reference."""
    core, usual = by_kind.get((reference["ffn"], 0)), float(reference[mode])
    if core is None:
        return {}
    ratio, plain = float(reference["ratio"]), {ffn: points for (ffn, window), points in by_kind.items() if not window}
    windows = [window for ffn, window in by_kind if window and ffn == reference["ffn"]]
    filled = {}
    for (ffn, measured), window in itertools.product(plain.items(), (0, *windows)):
        base = by_kind[reference["ffn"], window]  # of the reference's FFN
        points = dict(by_kind.get((ffn, window), {}))
        axes = [sorted({at[axis] for grid in (base, measured) for at in grid}) for axis in range(4)]
        for length, width, r, share in itertools.product(*axes):
            if (length, width, r, share) in points or (length, width, ratio, share) not in base:
                continue
            for at in (length, usual):
                this, other = measured.get((at, width, r, 1.0)), core.get((at, width, ratio, 1.0))
                if this is not None and other is not None:
                    beyond = (this - other) * (length / at if mode == "prefill" else 1.0)
                    points[length, width, r, share] = max(0.0, base[length, width, ratio, share] + beyond)
                    break
        filled[ffn, window] = points
    return filled


# --- 5. metrics ------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """A cost as a sum over the parts of a model, in its unit. `name` tells sums apart.

    Every part is a multiple of `grid`.
    """

    name: Key
    block: Callable[[Any, Any], float]
    change: Callable[[int, int], float]
    ends: Callable[[Any, int, int], float]
    activation: Callable[[Any, Any], float] | None = None
    end_activation: Callable[[Any], float] | None = None
    grid: float = 1 / 16

    def total(self, m: Any, blocks: Sequence[Block]) -> float:
        """The cost of a whole model with these blocks."""
        changes = sum(self.change(x.width, y.width) for x, y in itertools.pairwise(blocks))
        total = self.ends(m, blocks[0].width, blocks[-1].width) + changes
        total += sum(self.block(m, b) for b in blocks)
        if self.activation is not None and self.end_activation is not None:
            total += max(self.end_activation(m), *(self.activation(m, b) for b in blocks))
        return total


class Metric(NamedTuple):
    """The least over `alternatives` of the largest of their sums; one of the metric is `scale` units."""

    alternatives: list[list[Sum]]
    scale: float
    positions: int  # that a model needs

    def value(self, m: Any, blocks: Sequence[Block]) -> float:
        return min(max(each.total(m, blocks) for each in sums) for sums in self.alternatives) / self.scale


class Metrics:
    """The metrics of a result, by their keys as `decode_ms@1024`."""

    def __init__(self, space: Space, document: dict[str, Any]) -> None:
        self.space, self.precision, self.target = space, document["precision"], document.get("target")
        self.tables: dict[str | None, Table] = {}
        forms = [form for form in (document["table"], *document.get("more_tables", [])) if form is not None]
        for form in forms:
            precision = form["header"]["precision"]
            require(precision not in self.tables, f"there are two tables of {precision}")
            self.tables[precision] = Table(form, space, precision, forms[0].get("faces"))
        require(
            not forms or next(iter(self.tables)) == self.precision, "the table has another precision than the result"
        )
        for precision in (self.precision, *space.precisions):
            Storage(precision, self.target)

    def of(self, key: str, vocabulary: int) -> Metric:
        """The metric for models of one vocabulary."""
        name, mark, text = key.partition("@")
        stored, no_change = Storage(self.precision, self.target), lambda before, after: 0.0
        if name == "weight_mb":
            return Metric([[self._weights(text)]], 1e6, 1)
        require(not mark or text.isdecimal(), f"there is no metric {key}")
        at = int(text) if mark else 0
        if name in ("parameters", "flops") and not mark:
            if name == "parameters":
                return Metric([[Sum((key,), block_parameters, projection, end_parameters, grid=1.0)]], 1.0, 1)
            twice = 2 * FLOPS_SEQUENCE
            flops = Sum((key,), block_flops, lambda x, y: twice * projection(x, y), lambda m, f, s: 0.0, grid=1.0)
            return Metric([[flops]], 1.0, 1)
        if name == "kv_mb":
            cache = Sum((key,), lambda m, b: stored.kept(m, b, at or m.max_positions), no_change, lambda m, f, s: 0.0)
            return Metric([[cache]], 1e6, at or 1)
        require(at > 0, f"there is no metric {key}")
        if name == "peak_mb" and self.target == "onnxruntime":
            return Metric([self._peak_of_cpu(at)], 1e6, at)
        if name == "peak_mb" and TARGETS[self.target].tensorrt:
            return Metric([[self._peak_of_tensorrt()]], 1e6, at)
        if name == "peak_mb":
            weights = self._weights(self.precision)
            peak = weights._replace(
                name=(key,),
                block=lambda m, b: weights.block(m, b) + stored.cache(m, b, m.max_positions),
                activation=lambda m, b: activation_bytes(m, b, at),
                end_activation=lambda m: end_activation_bytes(m, at),
            )
            return Metric([[peak]], 1e6, at)
        return self._latency(name, at, vocabulary)

    def _weights(self, precision: str) -> Sum:
        stored = Storage(precision, self.target)
        own = {name: Storage(name, self.target) for name in self.space.precisions}
        return Sum(
            ("weight_mb", precision),
            lambda m, b: own.get(b.precision, stored).block(m, b),
            stored.change,
            stored.ends,
        )

    def _peak_of_cpu(self, tokens: int) -> list[Sum]:
        """What ONNX Runtime's CPU engine holds while it loads, and while it runs a full cache."""
        stored, step = Storage(self.precision, self.target), min(tokens, 128)
        held = {name: Held(name) for name in (self.precision, *self.space.precisions)}
        base, head = held[self.precision], stored.head
        twice = 4.0 if head.bits == 16 else head.bits / 8

        def loading(m: Any, b: Any) -> float:
            own = held[b.precision or self.precision]
            return float(own.block(m, b) + 4 * own.widened * matrix_elements(m, b))

        def running(m: Any, b: Any) -> float:
            return held[b.precision or self.precision].block(m, b) + stored.kept(m, b, m.max_positions)

        def rows(m: Any, first: int) -> float:
            looked_up = stored.embedding.bytes(min(m.vocab_size, m.max_positions), m.embedding_width)
            return looked_up + stored.positions.bytes(m.position_rows, first)

        def activation(m: Any, b: Any) -> float:
            elements = b.heads * m.max_positions + 4 * b.width + (4 if m.gated else 3) * b.ffn_width
            return float(1.5 * step * elements * 4)

        return [
            Sum(
                ("loading",),
                loading,
                base.change,
                lambda m, first, last: base.ends(m, first, last) + twice * m.vocab_size * m.embedding_width,
            ),
            Sum(
                ("running", tokens),
                running,
                base.change,
                lambda m, first, last: base.ends(m, first, last) + rows(m, first),
                activation,
                lambda m: end_activation_bytes(m, step),
            ),
        ]

    def _peak_of_tensorrt(self) -> Sum:
        """Weights, cache, and what TensorRT reserves for prompts of 512 tokens and for steps of one."""
        stored, weights = Storage(self.precision, self.target), self._weights(self.precision)
        element, copies = stored.cache_bytes, not stored.native

        def block(m: Any, b: Any) -> float:
            positions = m.max_positions + (min(512, m.max_positions) if copies else 0)
            return weights.block(m, b) + stored.cache(m, b, positions)

        def ends(m: Any, first: int, last: int) -> float:
            widened = 2 * m.vocab_size * m.embedding_width if stored.splits_table else 0
            return float(weights.ends(m, first, last) + 16_450_000 + widened + 8 * m.vocab_size * 4)

        def activation(m: Any, b: Any) -> float:
            context, tokens = m.max_positions, min(512, m.max_positions)
            step = context * b.width * element + 283 * b.ffn_width
            if not copies:
                return float(step + tokens * (4 * context + 5.5 * b.width + 5 * b.ffn_width))
            scores = (4 + element) * b.heads * (context + tokens)
            return float(step + tokens * (scores + (20 + 3 * element) * b.width))

        return Sum(("reserved",), block, weights.change, ends, activation, lambda m: 0.0)

    def _latency(self, name: str, at: int, vocabulary: int) -> Metric:
        if self.precision not in self.tables:
            raise Refused(f"{name} has a value, but the result has no table")
        tables, scale, positions = self.tables, 1.0, at
        table = tables[self.precision]
        if name in ("text_ms", "first_token_ms"):
            per_token = finite(self.space.vocabularies[vocabulary]["bytes_per_token"], "bytes_per_token")
        if name == "first_token_ms":
            positions = math.ceil(at / per_token)
            step = Step("prefill", positions)
        elif name in ("decode_ms", "text_ms"):
            step, scale = Step("decode", at), per_token / 100 if name == "text_ms" else 1.0
        elif name in ("prefill_ms", "energy_mj"):
            step = Step("prefill", at) if name == "prefill_ms" else Step("decode", at, "mj")
        else:
            raise Refused(f"there is no metric {name}")

        def one(piece: Step) -> Sum:
            return Sum(
                piece,
                lambda m, b: tables[b.precision or self.precision].block(m, b, piece),
                lambda x, y: table.change(x, y, piece),
                lambda m, first, last: table.ends(m, first, last, piece),
                grid=2.0**-30,
            )

        return Metric([[one(piece) for piece in pieces] for pieces in table.steps(step)], scale, positions)


def most_units(limit: float, scale: float) -> float:
    """The largest number of units that divided by `scale` is at most `limit`."""
    units = limit * scale
    while units / scale > limit:
        units = math.nextafter(units, 0)
    while math.nextafter(units, math.inf) / scale <= limit:
        units = math.nextafter(units, math.inf)
    return units


# --- 6. scores -------------------------------------------------------------------------------------

LOST_GRID = 2.0**-30  # what rounding costs is a multiple of it
BUILT_IN = ("effective", "cut", "exit", "counting", "parameters", "flops")
CONSTANTS = {
    "alpha_mha": 0.57,
    "alpha_ffn": 0.43,
    "epsilon_squared": 700.0,
    "beta_depth": 1 / 16,
    "effectiveness_power": 1.0,
    "shared_layer": 1.0,
}


@cache
def matrix_entropy(rows: int, columns: int, epsilon_squared: float) -> float:
    """The mean entropy of a random matrix, in nats."""
    m, n = sorted((rows, columns))
    beta, g = m / n, n / epsilon_squared
    upper = math.sqrt(1 + g * (1 + math.sqrt(beta)) ** 2)
    lower = math.sqrt(1 + g * (1 - math.sqrt(beta)) ** 2)
    quarter_f = 4 * beta * (g / (upper + lower)) ** 2
    limit = n * (beta * math.log1p(g - quarter_f) + math.log1p(g * beta - quarter_f) - quarter_f / g)
    return limit + math.log(2 * math.sqrt(upper * lower) / (upper + lower))


class Score:
    """A score: what a block adds, the factor of the last block's width, and what it depends on."""

    def __init__(self, stated: dict[str, Any], space: Space, function: Any, build: Callable[[dict[str, Any]], Any]):
        self.space, self.build, self.function = space, build, function
        self.name, _, options = stated["name"].partition(":")
        self.constants, self.exit_power = dict(CONSTANTS), 0.0
        self.whole = self.users = False
        details = {key: value for key, value in stated.items() if key not in ("name", "total")}
        self.counts = self.name in ("parameters", "flops", "counting")
        if self.name in ("exit", "counting"):
            self.exit_power = 0.75
        if self.name == "counting":
            self.constants = {"shared_layer": 0.1}
        if self.name in ("effective", "cut", "exit", "counting"):
            for option in filter(None, options.split(",")):
                name, _, text = option.partition("=")
                if name == "exit_power" and self.exit_power:
                    self.exit_power = finite(float(text), name)
                else:
                    require(name in self.constants, f"score {stated['name']} has no option {name}")
                    self.constants[name] = finite(float(text), name)
            expected: dict[str, Any] = {"hyperparameters": self.constants} if not self.counts else dict(self.constants)
            expected |= {"exit_power": self.exit_power} if self.name in ("exit", "counting") else {}
            require(details == expected, "the score's constants are not those that its name says")
            signs = [*self.constants.values(), self.exit_power]
            require(min(signs) >= 0 and self.constants["shared_layer"] <= 1, "a constant of the score is out of range")
        elif self.name not in BUILT_IN or options:
            require(function is not None, f"score {stated['name']} is a user's, and its function is not at hand")
            self.users, self.whole = True, arguments(function) == 1

    def factor(self, width: int) -> float:
        """The factor for a last block of this width, rounded to 12 bits."""
        if self.name not in ("exit", "counting"):
            return 1.0
        mantissa, exponent = math.frexp(float(width) ** self.exit_power)
        return math.ldexp(round(mantissa * 2**12), exponent - 12)

    def block(self, template: Template, block: Block, depth: int, cut: int) -> float:
        """What a block adds in a model of `depth` layers behind a cut, less what rounding costs."""
        value = self._exact(template, block._replace(precision=None, lost=0.0), depth, cut)
        return value - round(block.lost * abs(value) / LOST_GRID) * LOST_GRID if block.lost else value

    def _exact(self, template: Template, block: Block, depth: int, cut: int) -> float:
        if self.users:
            value = self.function(self._model(template), self._built(block), depth, cut)
            return finite(float(value), "the score's value")
        m = self._plain(template)
        if self.name in ("parameters", "flops"):
            return block_parameters(m, block) if self.name == "parameters" else block_flops(m, block)
        if self.name == "counting":
            layer: float = block_parameters(m, block._replace(layers=1))
        else:
            shape = (block.width, block.kv_heads * m.head_dim, block.ffn_width)
            layer = self._layer(shape, m.gated, depth, cut if self.name == "cut" else None)
        repeated = block.layers - block.weight_layers
        return (block.weight_layers + round(1024 * self.constants["shared_layer"]) / 1024 * repeated) * layer

    @cached_property
    def _layer(self) -> Callable[..., float]:
        c = self.constants

        def penalty(depth: int, width: int) -> float:
            gamma = min(1.0, c["beta_depth"] * depth / math.log2(width)) if width > 1 else 1.0
            return float((1 - gamma) ** c["effectiveness_power"])

        @cache
        def layer(shape: tuple[int, int, int], gated: bool, depth: int, cut: int | None) -> float:  # noqa: FBT001
            width, kv_width, ffn_width = shape
            stream = width if cut is None else min(width, cut)
            query, key = (matrix_entropy(stream, n, c["epsilon_squared"]) for n in (width, kv_width))
            mha = 2 * (query + key)
            ffn = (3 if gated else 2) * matrix_entropy(stream, ffn_width, c["epsilon_squared"])
            mha *= c["alpha_mha"] * penalty(depth, width)
            ffn *= c["alpha_ffn"] * penalty(depth, ffn_width)
            return round((mha + ffn) / 2.0**-20) * 2.0**-20

        return layer

    @cached_property
    def _plain(self) -> Callable[[Template], Any]:
        return cache(lambda template: plain(self.space.fields(template, ())))

    @cached_property
    def _model(self) -> Callable[[Template], Any]:
        """What is around a block: a model whose own blocks have no meaning."""
        return cache(lambda template: self.build(self.space.fields(template, self.space.choices[:1])))

    @cached_property
    def _built(self) -> Callable[[Block], Any]:
        return cache(lambda block: self.build(self.space.fields(self.space.templates[0], (block,))).blocks[0])

    def total(self, template: Template, blocks: Sequence[Block]) -> float:
        """The score of a whole model."""
        if self.whole:
            return finite(float(self.function(self.build(self.space.fields(template, blocks)))), "the score's value")
        depth, cut = sum(b.layers for b in blocks), min(template.embedding_width, blocks[0].width)
        return self.factor(blocks[-1].width) * math.fsum(self.block(template, b, depth, cut) for b in blocks)

    @cached_property
    def _tables(self) -> dict[Key, Floats]:
        return {}

    def highest(self, templates: Sequence[Template], first: Sequence[int], last: Sequence[int]) -> Floats:
        """[depths, choices]: the highest score that a block has in any model of these templates and outer widths."""
        space, tables = self.space, {}
        for template in templates:
            seen: Any = template if self.users else template.ffn
            cuts = {min(template.embedding_width, space.widths[w]) for w in first if w in space.allowed(template)}
            for cut in cuts if self.users or self.name == "cut" else {0}:
                tables[seen, cut] = template, cut
        for key, (template, cut) in tables.items():
            if key not in self._tables:
                self._tables[key] = self._table(template, cut)
        raw = [self._tables[key] for key in tables]
        return np.asarray(np.maximum.reduce([self.factor(space.widths[w]) * table for w in last for table in raw]))

    def _table(self, template: Template, cut: int) -> Floats:
        space, allowed = self.space, set(self.space.allowed(template))
        wanted = [i for i, w in enumerate(space.width_of) if not self.users or w in allowed]
        table = np.full((len(space.depths), len(space.choices)), -np.inf)
        if self.users:  # millions of calls in a large space
            model, lost = self._model(template), np.array([space.choices[i].lost for i in wanted])
            built = [self._built(space.choices[i]._replace(precision=None, lost=0.0)) for i in wanted]
            for row, depth in enumerate(space.depths):
                values = np.array([self.function(model, block, depth, cut) for block in built], float)
                require(np.isfinite(values).all(), "the score's value is not a finite number")
                table[row, wanted] = values - np.rint(lost * np.abs(values) / LOST_GRID) * LOST_GRID
            return table
        for row, depth in enumerate(space.depths):
            table[row, wanted] = [self.block(template, space.choices[i], depth, cut) for i in wanted]
        return table


def arguments(function: Any) -> int:
    """How many arguments a user's function needs."""
    return sum(p.default is p.empty for p in inspect.signature(function).parameters.values())


# --- 7. programs -----------------------------------------------------------------------------------


class Program(NamedTuple):
    """The costs of a template's models by one alternative of every budget, as arrays."""

    template: Template
    metrics: tuple[int, ...]  # [K] the budget of each sum
    allowed: list[int]
    cost: Floats  # [choices, K]
    change: Floats  # [W, W, K]
    start: Floats  # [W, K]
    finish: Floats  # [W, K]
    limits: Floats  # [K]
    peak: int  # the sum that activations count towards, -1 for none
    activation: Floats  # [choices]
    end_activation: float


class Programs:
    """All programs of a result, in order."""

    def __init__(self, space: Space, metrics: Metrics, budgets: dict[str, float]) -> None:
        self.space, self._arrays = space, {}  # type: ignore[var-annotated]
        self.all: list[Program] = []
        for template in space.templates:
            costs = [metrics.of(key, template.vocabulary) for key in budgets]
            if all(template.context >= cost.positions for cost in costs):
                for selected in itertools.product(*(cost.alternatives for cost in costs)):
                    sums = [(each, k) for k, alternative in enumerate(selected) for each in alternative]
                    limits = [most_units(limit, c.scale) for limit, c in zip(budgets.values(), costs, strict=True)]
                    self.all.append(self._program(template, sums, limits))

    def _program(self, template: Template, sums: list[tuple[Sum, int]], limits: list[float]) -> Program:
        space, m = self.space, plain(self.space.fields(template, ()))
        allowed, widths, count = space.allowed(template), space.widths, len(space.widths)
        require(allowed, "a template has no width")
        usable = np.isin(space.width_of, allowed)
        low, high = widths[allowed[0]], widths[allowed[-1]]
        cost = np.full((len(space.choices), len(sums)), np.inf)
        change, start, finish = (np.full((*s, len(sums)), np.inf) for s in ((count, count), (count,), (count,)))
        peak, activation, end_activation = -1, np.zeros(len(space.choices)), 0.0
        for k, (each, _) in enumerate(sums):
            key = (each.name, template.ffn, template.context)
            cost[usable, k] = self._blocks(key, each.block, m)[usable]
            for w in allowed:
                start[w, k] = each.ends(m, widths[w], high)
                finish[w, k] = each.ends(m, low, widths[w]) - each.ends(m, low, high)
                for after in allowed:
                    if after >= w:
                        change[w, after, k] = self._change(each, widths[w], widths[after])
            parts = [part[..., k].ravel() for part in (cost, change, start, finish)]
            if each.activation is not None and each.end_activation is not None:
                require(peak < 0, "two budgets are for peak memory")
                peak, end_activation = k, each.end_activation(m)
                activation = self._blocks((*key, "activation"), each.activation, m)
                parts += [activation, np.array([end_activation])]  # on this sum's grid, not on the next ones'
            largest = max(np.abs(part[np.isfinite(part)]).max(initial=0.0) for part in parts)
            most = EXACT * each.grid / (space.block_counts[-1] + 4)
            require(largest <= most, "a cost is so large that sums of it are not exact")
        return Program(
            template=template,
            metrics=tuple(k for _, k in sums),
            allowed=allowed,
            cost=cost,
            change=change,
            start=start,
            finish=finish,
            limits=np.array([limits[k] for _, k in sums]),
            peak=peak,
            activation=activation,
            end_activation=end_activation,
        )

    def _blocks(self, key: Key, value: Callable[[Any, Any], float], m: Any) -> Floats:
        """[choices]: a value of every block choice, infinite where the widths of no template allow it."""
        if key not in self._arrays:
            reached = {w for template in self.space.templates for w in self.space.allowed(template)}
            pairs = zip(self.space.choices, self.space.width_of, strict=True)
            self._arrays[key] = np.array([value(m, b) if w in reached else math.inf for b, w in pairs], float)
        return np.asarray(self._arrays[key])

    def _change(self, each: Sum, before: int, after: int) -> float:
        key = (each.name, before, after)
        if key not in self._arrays:
            self._arrays[key] = each.change(before, after)
        return float(self._arrays[key])


# --- 8. tasks --------------------------------------------------------------------------------------


class Tasks:
    """The tasks of one class: the same programs, outer widths and activations, and one task for each depth."""

    def __init__(self, space: Space, programs: Sequence[Program], first: list[int], last: list[int], band: Floats):
        self.space, self.first, self.last = space, first, last
        self.allowed = sorted({w for p in programs for w in p.allowed})
        self.activation = np.minimum.reduce([p.activation for p in programs])
        self.peak = programs[0].peak
        base = max(min(p.end_activation for p in programs), float(band[0]))
        usable = np.isin(space.width_of, self.allowed)
        if self.peak >= 0:
            usable &= self.activation <= band[1]
        self.index = np.flatnonzero(usable)
        self.width, self.layers = space.width_of[self.index], space.layers_of[self.index]
        self.cost = np.minimum.reduce([p.cost for p in programs])[self.index]
        self.extra = np.maximum(self.activation[self.index] - base, 0.0)
        self.change = np.minimum.reduce([p.change for p in programs])
        self.start = np.minimum.reduce([p.start for p in programs]).copy()
        if self.peak >= 0:
            self.start[:, self.peak] += base
        self.finish = np.minimum.reduce([p.finish for p in programs])
        self.limits = np.maximum.reduce([p.limits for p in programs])
        # What the terms of a Lagrangian add up to at most, while a path keeps the limits.
        ends = [np.abs(side[self.allowed]).max(0, initial=0.0) for side in (self.start, self.finish)]
        self.magnitudes = self.limits + np.where(np.isfinite(ends), ends, 0.0).sum(0)  # [K]
        breaks = (np.diff(self.width) != 0) | (np.diff(self.layers) != 0)
        self.cells = np.concatenate(([0], np.flatnonzero(breaks) + 1)) if len(self.index) else np.zeros(0, int)

    def rest(self, prices: Floats, scores: Floats, depth: int) -> tuple[Floats, Floats]:
        """The Lagrangian's best values for N price vectors [N, K] and scores [N, choices of the class].

        First [n, N, W, depth + 1]: the best rest after a block of each width, with n blocks and so many layers to go.
        Then the same with the width of the next block given, without the step to it.
        """
        count, most = len(self.space.widths), self.space.block_counts[-1]
        shape = (most + 1, len(prices), count, depth + 1)
        to_go, placed = np.full(shape, -np.inf), np.full(shape, -np.inf)
        for w in self.last:
            if w in self.allowed:
                to_go[0, :, w, 0] = -(prices @ self.finish[w])
        lengths = np.unique(self.layers)
        best = np.full((len(lengths), len(prices), count), -np.inf)
        if len(self.index):
            reduced = scores - prices @ self.cost.T
            cells = np.maximum.reduceat(reduced, self.cells, axis=1)
            place = np.searchsorted(lengths, self.layers[self.cells])
            best[place, :, self.width[self.cells]] = cells.T
        change = np.full((len(prices), count, count), -np.inf)
        for x, y in itertools.product(self.allowed, self.allowed):
            if y >= x and np.isfinite(self.change[x, y]).all():  # else no program has both widths
                change[:, x, y] = -(prices @ self.change[x, y])
        for n in range(1, most + 1):
            for length, values in zip(lengths[lengths <= depth], best, strict=False):
                rows = placed[n, :, :, length:]
                np.maximum(rows, values[:, :, None] + to_go[n - 1, :, :, : depth + 1 - length], out=rows)
            for y in self.allowed:
                np.maximum(to_go[n], change[:, :, y, None] + placed[n][:, None, y], out=to_go[n])
        return to_go, placed

    def bounds(self, prices: Floats, scores: Floats) -> Floats:
        """[depths]: the bound of each task by its prices [depths, K]; minus infinity where no path is as deep."""
        depths = self.space.depths
        _, placed = self.rest(prices, scores[:, self.index], depths.stop - 1)
        bound = np.full(len(depths), -np.inf)
        for n, w in itertools.product(self.space.block_counts, self.first):
            if w in self.allowed:
                whole_path = placed[n, np.arange(len(depths)), w, np.array(depths)] - prices @ self.start[w]
                bound = np.maximum(bound, whole_path)
        return np.asarray(bound + prices @ self.limits)

    def magnitude(self, prices: Floats, bounds: Floats) -> Floats:
        """What rounding errors are a share of."""
        path = np.where(np.isfinite(bounds), np.abs(bounds - prices @ self.limits), 0.0)
        return np.asarray(path + prices @ self.magnitudes)

    def enumerate(self, depth: int, prices: Floats, scores: Floats, threshold: float) -> tuple[float, int]:
        """The highest score above `threshold` in a task, minus infinity if there is none, and the partial models tried.

        Partial models grow by a block. One is dropped if no completion keeps the limits or gets above the threshold, by
        any of the price vectors [N, K]. One is dropped too where another scores as much and costs no more. Every
        comparison keeps a model where a number is none.
        """
        space, sums, scores = self.space, len(self.limits), scores[self.index]
        to_go, _ = self.rest(prices, np.repeat(scores[None], len(prices), 0), depth)
        unit = np.eye(sums)
        least, _ = self.rest(unit, np.zeros((sums, len(self.index))), depth)  # [n, K, W, left], negated
        counts = space.block_counts
        best, tried = -math.inf, 0
        labels: dict[int, tuple[Floats, ...]] = {}  # by width: score, costs, extra, layers left
        for n in range(1, counts[-1] + 1):
            more = [total - n for total in counts if total >= n]
            rest, floor = to_go[more].max(0), -least[more].max(0)  # [N, W, left], [K, W, left]
            grown: dict[int, tuple[Floats, ...]] = {}
            for w in self.allowed:
                choices = np.flatnonzero(self.width == w)
                if n == 1 and w in self.first:
                    before = [(np.zeros(1), self.start[w][None], np.zeros(1), np.full(1, float(depth)))]
                else:
                    before = [
                        (score, cost + self.change[x, w], extra, left)
                        for x, (score, cost, extra, left) in labels.items()
                        if x <= w
                    ]
                parts = []
                for score, cost, extra, left in before:
                    stride = max(1, CHUNK // max(1, len(choices)))
                    for at in range(0, len(score), stride):
                        part = slice(at, at + stride)
                        group = (score[part], cost[part], extra[part], left[part])
                        parts.append(self._extend(group, choices, w, (scores, prices, rest, floor, threshold)))
                if parts:
                    joined = tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
                    kept = _undominated(joined)
                    grown[w] = tuple(column[kept] for column in joined)
            labels = grown
            alive = sum(len(columns[0]) for columns in labels.values())
            tried += alive
            require(alive <= MAX_PARTIAL_MODELS, "a task needs too many partial models to be checked")
            if n in counts:
                for w in set(self.last) & set(labels):
                    score, cost, extra, left = labels[w]
                    total = cost + self.finish[w]
                    if self.peak >= 0:
                        total[:, self.peak] += extra
                    within = (left == 0) & ~(total > self.limits).any(1)
                    best = max(best, float(score[within].max(initial=-np.inf)))
        return best if best > threshold else -math.inf, tried

    def _extend(
        self, labels: tuple[Floats, ...], choices: NDArray[np.intp], w: int, bounds: tuple[Any, ...]
    ) -> tuple[Floats, ...]:
        """The partial models that `labels` become by one of `choices`, all of width index `w`, if they may matter."""
        (score, cost, extra, left), (scores, prices, rest, floor, threshold) = labels, bounds
        after = left[:, None] - self.layers[choices][None]
        rows, columns = np.nonzero(after >= 0)
        columns, remaining = choices[columns], after[rows, columns].astype(int)
        for prices_n, rest_n in zip(prices, rest, strict=True):
            value = score[rows] + scores[columns] - (cost @ prices_n)[rows] - (self.cost @ prices_n)[columns]
            if self.peak >= 0:
                value -= prices_n[self.peak] * np.maximum(extra[rows], self.extra[columns])
            value += rest_n[w, remaining] + prices_n @ self.limits
            size = np.abs(score[rows]) + np.abs(scores[columns]) + 2 * (prices_n @ self.magnitudes) + abs(threshold)
            hopeful = ~(value + ROUNDING * size <= threshold)
            rows, columns, remaining = rows[hopeful], columns[hopeful], remaining[hopeful]
        costs, extras = cost[rows] + self.cost[columns], np.maximum(extra[rows], self.extra[columns])
        total = costs + floor[:, w, remaining].T
        if self.peak >= 0:
            total[:, self.peak] += extras
        fits = ~(total > self.limits).any(1)
        rows, columns = rows[fits], columns[fits]
        return score[rows] + scores[columns], costs[fits], extras[fits], remaining[fits].astype(float)


def _undominated(labels: tuple[Floats, ...], block: int = 512) -> NDArray[np.intp]:
    """The partial models that no other of as many layers undercuts; of equal ones the first."""
    score, cost, extra, left = labels
    columns = np.column_stack((cost, extra))
    order = np.lexsort((*columns.T[::-1], -score, left))
    kept = []
    for group in np.split(order, np.flatnonzero(np.diff(left[order])) + 1):
        alive = group
        while len(alive):
            head, alive = alive[:block], alive[block:]
            worse = np.tril((columns[head][:, None] >= columns[head][None]).all(-1), -1).any(1)
            head = head[~worse]
            kept.append(head)
            for k in range(0, len(head), 64):  # a few at a time, to limit memory
                some = columns[head[k : k + 64]]
                alive = alive[~np.any(np.all(columns[alive][:, None] >= some[None], axis=-1), axis=1)]
    return np.concatenate(kept) if kept else np.zeros(0, np.intp)


# --- 9. the proof ----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a check did."""

    score: float
    bound: float
    architectures: int
    by_prices: int  # tasks
    by_trying: int  # tasks
    partial_models: int
    seconds: float

    def line(self) -> str:
        tried = f"{self.by_trying:,} by trying {self.partial_models:,} partial models"
        return (
            f"the claim holds: of {self.architectures:,} architectures none within the budgets scores above "
            f"{self.bound:,.2f} "
            f"({self.by_prices:,} tasks by prices, {tried}, {self.seconds:.1f} s)"
        )


def prove(space: Space, score: Score, programs: Programs, certificate: dict[str, Any]) -> tuple[int, int, int]:
    """Prove the certificate's bound. Returns the tasks closed by prices, those closed by trying, and the effort."""
    left = set(range(len(programs.all)))
    effort = [0, 0, 0]
    bound = finite(certificate["bound"], "the bound")

    def take(text: str) -> list[Program]:
        numbers = [int(n) for n in text.split()]
        require(len(set(numbers)) == len(numbers) and set(numbers) <= left, "a program is proven twice, or unknown")
        left.difference_update(numbers)
        return [programs.all[n] for n in numbers]

    for program in take(certificate["too_dear"]):
        _check_too_dear(space, program)
    for group in certificate["groups"]:
        members = take(group["programs"])
        require(members and len({p.metrics for p in members}) == 1, "a group mixes programs of different sums")
        classes = []
        for one in group["classes"]:
            low, high = one["activation"]
            band = np.array([float(low), math.inf if high is None else float(high)])
            require(0 <= band[0] < band[1], "a class has no activations")
            classes.append((one, _between(space, one["first"]), _between(space, one["last"]), band))
        _check_cover(space, members, classes)
        for one, first, last, band in classes:
            tasks = Tasks(space, members, first, last, band)
            scores = score.highest([p.template for p in members], first, last)
            _check_class(tasks, scores, one, bound, effort)
    require(not left, f"nothing is proven about {len(left)} programs")
    return effort[0], effort[1], effort[2]


def _check_cover(space: Space, members: Sequence[Program], classes: Sequence[tuple[Any, ...]]) -> None:
    """Check that every model of a group is in one of its classes: by depth, outer widths and activations."""
    edges = sorted({float(x) for *_, band in classes for x in band} | {0.0, math.inf})
    count = len(space.widths)
    covered = np.zeros((len(space.depths), count, count, len(edges) - 1), bool)
    for one, first, last, band in classes:
        depths = [row for row, line in enumerate(one["tasks"]) if line != NOT_HERE]
        bands = range(edges.index(band[0]), edges.index(band[1]))
        covered[np.ix_(depths, first, last, bands)] = True
    reached = sorted({w for p in members for w in p.allowed})
    inside = np.triu(np.ones((count, count), bool))
    inside &= np.isin(np.arange(count), reached)[:, None] & np.isin(np.arange(count), reached)[None]
    require(covered[:, inside].all(), "some models of a group are in none of its classes")


def _between(space: Space, ends: list[int]) -> list[int]:
    low, high = ends
    return [i for i, w in enumerate(space.widths) if low <= w <= high]


def _check_too_dear(space: Space, program: Program) -> None:
    w = program.allowed
    cheapest = program.cost[np.isin(space.width_of, w)].min(0)
    floor = program.start[w].min(0) + program.finish[w].min(0) + space.block_counts[0] * cheapest
    require((floor > program.limits).any(), "a program is called too dear, and is not")


def _check_class(tasks: Tasks, scores: Floats, one: dict[str, Any], bound: float, effort: list[int]) -> None:
    """Check every task of a class: by its prices, or by trying where the certificate says so."""
    space, sums = tasks.space, len(tasks.limits)
    lines, tried = one["tasks"], {whole(depth, "a depth") for depth in one["tried"]}
    require(
        len(lines) == len(space.depths) and all(type(n) is str for n in lines) and tried <= set(space.depths),
        "a class does not have a task for each depth",
    )
    stated, prices = [], []
    here = np.array([line != NOT_HERE for line in lines])
    for line in lines:
        value, _, vectors = (line if line != NOT_HERE else f"none: {'0 ' * sums}").partition(":")
        stated.append(-math.inf if value == "none" else finite(float(value), "a task's bound"))
        rows = [[float(x) for x in text.split()] for text in vectors.split(";")]
        require(all(len(row) == sums for row in rows), "a task has more or fewer prices than sums")
        require(all(0 <= x <= HIGHEST_PRICE for row in rows for x in row), "a price is negative, too high or no number")
        prices.append(np.array(rows).reshape(len(rows), sums))
    first = np.array([rows[0] for rows in prices]).reshape(len(lines), sums)
    bounds = tasks.bounds(first, scores)
    size = tasks.magnitude(first, bounds)
    told = np.array(stated)
    both = np.isfinite(told) & np.isfinite(bounds)
    apart = np.abs(np.subtract(told, bounds, out=np.zeros(len(told)), where=both))
    require(
        np.where(both, apart <= STATED * size, told == bounds)[here].all(),
        "the prices of a task give another bound than it states",
    )
    largest = float(np.abs(scores[np.isfinite(scores)]).max(initial=0.0))
    threshold = bound + max(TOLERANCE * abs(bound), 32 * space.block_counts[-1] * largest / EXACT)
    for row, depth in enumerate(space.depths):
        if not here[row]:
            continue
        if depth not in tried:
            require(
                bounds[row] + ROUNDING * size[row] <= threshold,
                f"a task of depth {depth} has the bound {bounds[row]:.10g}, above the claimed {bound:.10g}",
            )
            effort[0] += 1
        else:
            found, count = tasks.enumerate(depth, prices[row], scores[row], threshold)
            require(found == -math.inf, f"a model of depth {depth} scores {found:.10g}, above the claimed {bound:.10g}")
            effort[1] += 1
            effort[2] += count


def try_all(space: Space, score: Score, metrics: Metrics, budgets: dict[str, float], bound: float) -> int:
    """Check the bound of a score that is no sum: try every architecture. Returns how many there were."""
    count, threshold = 0, bound + TOLERANCE * abs(bound)
    require(space.size() <= 1_000_000, "the space is too large to try every architecture")
    for template in space.templates:
        kinds = {key: metrics.of(key, template.vocabulary) for key in budgets}
        for blocks in _models(space, template):
            count += 1
            if any(template.context < kind.positions for kind in kinds.values()):
                continue
            if score.total(template, blocks) > threshold:
                m = plain(space.fields(template, blocks))
                within = all(kinds[key].value(m, blocks) <= limit for key, limit in budgets.items())
                require(not within, f"an architecture scores above the claimed {bound:.10g}")
    return count


def _models(space: Space, template: Template) -> Iterator[tuple[Block, ...]]:
    usable = {w: [b for b in space.choices if b.width == space.widths[w]] for w in space.allowed(template)}
    for n in space.block_counts:
        for widths in itertools.combinations_with_replacement(sorted(usable), n):
            yield from itertools.product(*(usable[w] for w in widths))


# --- 10. the result --------------------------------------------------------------------------------


def check(
    document: dict[str, Any],
    function: Any = None,
    build: Callable[[dict[str, Any]], Any] = plain,
) -> Outcome:
    """Check a whole result. Raises Refused with what is wrong.

    `function` is a user's own score. `build` makes the models that it gets from their form.
    """
    try:
        with np.errstate(all="ignore"):  # what is no number is refused
            return _check(document, function, build)
    except Refused:
        raise
    except (KeyError, IndexError) as error:
        raise Refused(f"a field is missing ({type(error).__name__}: {error})") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Refused(f"a field cannot be read ({type(error).__name__}: {error})") from None


def _check(document: dict[str, Any], function: Any, build: Callable[[dict[str, Any]], Any]) -> Outcome:
    began = time.monotonic()
    check_envelope(document)
    certificate, budgets = document["certificate"], document["budgets"]
    form = document["space"]["form"]
    require(document["space"]["sha256"] == canonical_hash(form), "the space does not match its sha256")
    require(document["space"]["name"] == form["name"], "the space has another name")
    space = Space(form)
    metrics = Metrics(space, document)
    score = Score(document["score"], space, function, build)
    template, blocks = _found(space, document)
    m = plain(space.fields(template, blocks))

    for key, limit in budgets.items():
        require(finite(limit, key) > 0 and key in document["costs"], f"budget {key} is {limit!r}, or has no cost")
        kind = metrics.of(key, template.vocabulary)
        require(
            template.context >= kind.positions and kind.value(m, blocks) <= limit, f"the architecture exceeds {key}"
        )
    for key, value in document["costs"].items():
        own = metrics.of(key, template.vocabulary).value(m, blocks)
        require(value == own, f"{key} is {own!r}, and not the stated {value!r}")
    total = score.total(template, blocks)
    stated = finite(document["score"]["total"], "the score")
    require(abs(total - stated) <= 1e-12 * abs(total), f"the score is {total!r}, and not the stated {stated!r}")
    bound = finite(certificate["bound"], "the bound")
    gap = 0.0 if bound <= total else 100 * (bound - total) / abs(total)
    require(bound >= total - TOLERANCE * abs(total), "the bound is below the score")
    told = finite(certificate["gap_percent"], "the gap")
    require(abs(told - gap) <= 1e-9 * max(1.0, gap), f"the gap is {gap!r} %, and not the stated {told!r} %")
    require(certificate["architectures"] == space.size(), "the number of architectures is not the space's")

    if score.whole:
        tried = try_all(space, score, metrics, budgets, bound)
        return Outcome(total, bound, space.size(), 0, 0, tried, time.monotonic() - began)
    effort = prove(space, score, Programs(space, metrics, budgets), certificate)
    return Outcome(total, bound, space.size(), *effort, time.monotonic() - began)


def _found(space: Space, document: dict[str, Any]) -> tuple[Template, list[Block]]:
    """The template and the blocks of the stated architecture. Raises Refused where the space does not have it."""
    a, choices = document["architecture"], document["choices"]
    vocabulary = [v["size"] for v in space.vocabularies].index(a["vocab_size"])
    template = Template(a["ffn"], vocabulary, a["embedding_width"], a["max_positions"])
    lost = {b.precision: b.lost for b in space.choices}
    names = choices.get("precisions", [None] * len(a["blocks"]))
    blocks = [Block(**block, precision=name, lost=lost[name]) for block, name in zip(a["blocks"], names, strict=True)]
    widths = [block.width for block in blocks]
    inside = template in space.templates and all(block in space.choices for block in blocks)
    inside = inside and len(blocks) in space.block_counts and widths == sorted(widths)
    inside = inside and {space.widths.index(w) for w in widths} <= set(space.allowed(template))
    require(inside and space.fields(template, blocks) == a, "the architecture is not one of the space")
    require(document["id"] == canonical_hash(a)[:12], "the id is not the architecture's")
    stated = {
        "blocks": len(blocks),
        "ffn": template.ffn,
        "vocabulary": space.vocabularies[vocabulary],
        "embedding_width": template.embedding_width,
        "context": template.context,
        **({"precisions": names} if space.precisions else {}),
    }
    require(choices == stated, "the choices are not the architecture's")
    return template, blocks


# --- 11. the program -------------------------------------------------------------------------------


def users_function(stated: Any, allowed: str | None) -> Any:
    """The user's function that a score names, None for a built-in score.

    A result may come from anybody, and the function is run. So nothing is imported unless it is the `allowed` one.
    Raises NotAllowed where it is not, and Refused where its file is not the same as in the search.
    """
    if not isinstance(stated, dict) or not isinstance(stated.get("name"), str):
        raise Refused("its score cannot be read")
    spec, sha256 = stated["name"], stated.get("source_sha256")
    if spec.partition(":")[0] in BUILT_IN or sha256 is None:
        return None
    if spec != allowed:
        raise NotAllowed(f"its score is a user's program; if you trust that program, add: --score {spec}")
    module_name, _, name = spec.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            source = importlib.util.spec_from_file_location(path.stem, module_name)
        else:
            source = importlib.util.find_spec(module_name)
            path = Path((source and source.origin) or "")
        if source is None or source.loader is None or not path.is_file():
            raise Refused(f"the score's file {module_name} does not exist")
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise Refused(f"the score's file {module_name} has changed")
        if not module_name.endswith(".py"):
            return getattr(importlib.import_module(module_name), name)
        module = importlib.util.module_from_spec(source)
        sys.modules.setdefault(source.name, module)
        source.loader.exec_module(module)
        return getattr(module, name)
    except Refused:
        raise
    except Exception as error:  # whatever a user's file raises
        raise Refused(f"the score's function cannot be loaded ({type(error).__name__}: {error})") from None


def main(arguments_given: Sequence[str]) -> int:
    """Check each file. Returns the exit code."""
    wrong, paths, allowed = 0, list(arguments_given), None
    if "--score" in paths[:-1]:
        at = paths.index("--score")
        allowed = paths[at + 1]
        del paths[at : at + 2]
    for path in paths:
        try:
            document = read(Path(path))
            outcome = check(document, users_function(document.get("score"), allowed))
            sys.stdout.write(f"{path}: {outcome.line()}\n")
        except Refused as error:
            sys.stdout.write(f"{path}: refused: {error}\n")
            wrong = 1
    return wrong if paths else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
