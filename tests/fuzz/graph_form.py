"""The form of an ONNX graph: any field of any message exchanged, doubled or removed, external places respelled."""

from __future__ import annotations

import contextlib
from random import Random
from typing import Any

import onnx
from fuzz import byte_changes
from fuzz.draft import Codec

INTEGERS = (0, 1, -1, 2, 3, 7, 8, 16, 31, 64, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "tokens", "..", "../x", "/etc/passwd", "model.onnx.data", "Scan", "Loop", "If", "PythonOp", "a" * 300)
OPERATORS = ("Identity", "Loop", "If", "ConstantOfShape", "Range", "Expand", "Tile", "Pad", "RandomNormal", "MatMul")
DOMAINS = ("", "ai.onnx", "com.microsoft", "ai.onnx.ml", "ai.onnx.contrib", "my.own")
PLACES: tuple[tuple[str, str], ...] = (
    *(
        ("location", place)
        for place in ("model.onnx.data", "../x", "/etc/passwd", "", "tokenizer.json", "./model.onnx")
    ),
    *(("offset", number) for number in ("0", "1", "-1", "9" * 25, "4096", "x")),
    *(("length", number) for number in ("0", "4", "-1", "9" * 25, "99999999")),
    ("checksum", "x"),
)


def _messages(message: Any, depth: int = 0) -> list[Any]:
    """The message and those below it, without the many small ones."""
    found = [message]
    if depth < 6:
        for field, value in message.ListFields():
            if field.type != field.TYPE_MESSAGE:
                continue
            found += [m for one in _items(field, value)[:60] for m in _messages(one, depth + 1)]
    return found


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def _items(field: Any, value: Any) -> list[Any]:
    return list(value) if _repeated(field) else [value]


def _scalar(field: Any, rng: Random) -> Any:
    if field.type == field.TYPE_STRING:
        names = {"op_type": OPERATORS, "domain": DOMAINS}
        return rng.choice(names.get(field.name, TEXTS))
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\0", b"\xff" * 64, b"NHWC", b"x" * 9))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30))
    if field.type == field.TYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 6, 7, 9, 10, 11, 16))
    number = rng.choice(INTEGERS)
    if field.type in (field.TYPE_INT32,):
        return max(-(2**31), min(2**31 - 1, number))
    if field.type in (field.TYPE_UINT64,):
        return abs(number)
    return number


def _step(model: Any, rng: Random) -> Any:
    if isinstance(model, bytes):
        return byte_changes.step(model, rng)
    if rng.random() < 0.1:
        return byte_changes.step(model.SerializeToString(), rng)
    if rng.random() < 0.1 and model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        key, value = rng.choice(PLACES)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = (
            tensor.external_data.add() if rng.random() < 0.5 or not tensor.external_data else tensor.external_data[0]
        )
        entry.key, entry.value = key, value
        return model
    message = rng.choice(_messages(model))
    fields = list(message.DESCRIPTOR.fields) if rng.random() < 0.25 else [field for field, _ in message.ListFields()]
    if not fields:
        return model
    with contextlib.suppress(ValueError, TypeError):  # a number that the library does not take
        _change(message, rng.choice(fields), rng)
    return model


def _change(message: Any, field: Any, rng: Random) -> None:
    change = rng.random()
    if change < 0.15:
        message.ClearField(field.name)
    elif _repeated(field):
        items = getattr(message, field.name)
        if not items or change < 0.35:
            if field.type == field.TYPE_MESSAGE:
                if items:
                    items.add().CopyFrom(rng.choice(items))
                else:
                    items.add()
            else:
                items.append(_scalar(field, rng))
        elif change < 0.6:
            del items[rng.randrange(len(items))]
        elif field.type == field.TYPE_MESSAGE:
            one, other = rng.choice(items), rng.choice(items)
            kept = type(one)()
            kept.CopyFrom(one)
            one.CopyFrom(other)
            other.CopyFrom(kept)
        else:
            items[rng.randrange(len(items))] = _scalar(field, rng)
    elif field.type == field.TYPE_MESSAGE:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _scalar(field, rng))


def _encode(model: Any) -> bytes:
    return model if isinstance(model, bytes) else bytes(model.SerializeToString())


GRAPH = Codec(onnx.load_from_string, _step, _encode)
