"""Changes of a JSON document's structure: fields removed, doubled, swapped, of another type, extreme or deep.

`step` makes one change. `encode` also writes what the json module cannot: a key twice, 1e999, ten thousand brackets.
`sign` makes the document's own hash right again, so that the hash does not hide the loader behind it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from random import Random
from typing import Any

Document = Any
LARGE = 30_000  # characters of a long text, elements of a long list


class Raw:
    """A JSON text that is written as it stands."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __deepcopy__(self, memo: Any) -> Raw:
        return self


class Twin(str):
    """A key that a dict can hold beside the same key."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 16, 100, 255, 256, 65_535, 65_536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400),
    *(0.5, 1.0, -0.0, 1e-9, 5e-324, 2.5e-308, 1e308, -1e308, 1e19, 0.1 + 0.2, True, False, None),
    *map(Raw, ("1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "1" + "0" * 4000, "-0", "1E400")),
)
TEXTS = (
    *("", " ", "a", "\0", "\ud800", "x\udfffy", "\ufeff", "\u202e", "\x1b[31m", "é", "\U0001f98a", "\n", "a\nb", "\r"),
    *("..", "../x", "/etc/passwd", "/dev/zero", ".", "/", "\\", "~", "a/b", "C:\\x", "%s%n", "{0.__class__}", "{x}"),
    *("[red]x[/]", "[/]", "[link=x]", "nan", "inf", "-inf", "1", "-1", "1e5", "0x10", "true", "null", "[]", "{}"),
    *("a" * 300, "\u0301" * 200, "9" * 5000),
)
NESTED: tuple[Any, ...] = (
    *([], {}, [None], [[]], [{}], [""], [0], [1, 2], [True], ["a", "b"], [[1, 2], [3]], [None] * 9),
    *({"": None}, {"a": 1}, {"name": "x"}, {"\ud800": 1}, {"1": [1]}),
    *map(Raw, ("[" * 500 + "]" * 500, '{"a":' * 300 + "1" + "}" * 300)),
)
RARE: tuple[Callable[[], Any], ...] = (
    lambda: "a" * LARGE,
    lambda: [0] * LARGE,
    lambda: [[]] * LARGE,
    lambda: {str(i): i for i in range(LARGE)},
    lambda: Raw("[" * 10_000 + "]" * 10_000),
    lambda: Raw("[" * 100_000),
    lambda: "\U0001f98a" * LARGE,
)


def value(rng: Random) -> Any:
    """A value that no honest writer would write there."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.75:
        return rng.choice(TEXTS)
    return copy.deepcopy(rng.choice(NESTED)) if kind < 0.99 else rng.choice(RARE)()


def step(document: Document, rng: Random) -> Document:
    """The document with one change. It is changed in place where it can be."""
    slot = _slot(document, rng)
    if slot is None or rng.random() < 0.01:
        return value(rng)
    node, key = slot
    rng.choices(CHANGES, WEIGHTS)[0](node, key, document, rng)
    return document


def _slot(document: Document, rng: Random) -> tuple[Any, Any] | None:
    """A random place in the document: a container that is not empty, and a key of it."""
    node = document
    while isinstance(node, (dict, list)) and node:
        key: Any
        if isinstance(node, dict):
            key = rng.choice(list(node))
        else:  # the ends of a long list are as interesting as all the rest
            key = rng.choice((0, -1, rng.randrange(len(node)), rng.randrange(min(4, len(node)))))
        child = node[key]
        if not (isinstance(child, (dict, list)) and child and rng.random() < 0.85):
            return node, key
        node = child
    return None


def _replace(node: Any, key: Any, document: Document, rng: Random) -> None:
    node[key] = value(rng)


def _remove(node: Any, key: Any, document: Document, rng: Random) -> None:
    del node[key]


def _nudge(node: Any, key: Any, document: Document, rng: Random) -> None:
    """Change a value a little, so that its type stays and a relation to others breaks."""
    old = node[key]
    if isinstance(old, bool) or old is None:
        node[key] = rng.choice((not old, str(old), int(bool(old))))
    elif isinstance(old, (int, float)):
        reals = (float(old), old + 0.5) if abs(old) < 1e300 else ()
        nudges = (old + 1, old - 1, -old, old * 2, old // 2, old * 1000, *reals)
        node[key] = rng.choice((*nudges, str(old), [old]))
    elif isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        piece = rng.choice(TEXTS)[:20]
        node[key] = rng.choice(
            (old[:at], old[at:], old + old, old.upper(), old[:at] + piece + old[at:], [old], f" {old}")
        )
    elif isinstance(old, list):
        node[key] = rng.choice((old[::-1], old[:-1], old[1:], old + old, old * 50, [old], dict.fromkeys(map(str, old))))
    elif isinstance(old, dict):
        node[key] = rng.choice((list(old), list(old.values()), [old], {"": old}, dict(reversed(old.items()))))


def _twice(node: Any, key: Any, document: Document, rng: Random) -> None:
    if isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
    else:
        node[Twin(key)] = rng.choice((node[key], value(rng)))


def _rename(node: Any, key: Any, document: Document, rng: Random) -> None:
    if isinstance(node, dict):
        moved = node.pop(key)
        node[rng.choice((str(key).upper(), str(key)[:-1], f"{key}s", rng.choice(TEXTS), *node))] = moved


def _add(node: Any, key: Any, document: Document, rng: Random) -> None:
    if isinstance(node, dict):
        node[rng.choice((*TEXTS[:20], "kind", "sha256", "name", "extra"))] = value(rng)
    else:
        node.append(value(rng))


def _graft(node: Any, key: Any, document: Document, rng: Random) -> None:
    """Put a value of another place there: it is well-formed, and wrong."""
    other = _slot(document, rng)
    assert other is not None
    grafted = copy.deepcopy(other[0][other[1]] if rng.random() < 0.7 else other[0])
    if len(json.dumps(grafted, default=lambda raw: "")) < 20_000:
        node[key] = grafted


def _swap(node: Any, key: Any, document: Document, rng: Random) -> None:
    other = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    node[key], node[other] = node[other], node[key]


CHANGES = (_replace, _remove, _nudge, _twice, _rename, _add, _graft, _swap)
WEIGHTS = (45, 12, 18, 4, 4, 4, 9, 4)


# --- text and hashes -------------------------------------------------------------------------------


def encode(document: Document) -> bytes:
    """The document as the bytes of a file."""
    raws: dict[str, str] = {}

    def mark(raw: Any) -> str:
        name = f"\ue000{len(raws)}\ue001"
        raws[json.dumps(name)] = raw.text
        return name

    text = json.dumps(document, default=mark)
    for name, raw in raws.items():
        text = text.replace(name, raw)
    return text.encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(document: Document) -> bytes | None:
    """The text that a document's hash is taken over; None where the document is no JSON that can be read."""
    form: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    try:
        text = json.dumps(document, **form)
    except TypeError:  # it holds Raw
        try:
            text = json.dumps(json.loads(encode(document)), **form)
        except (ValueError, RecursionError):
            return None
    return text.encode("utf-8", "surrogatepass")


def sign(document: Document, digits: int = 64) -> None:
    """Make the document's `sha256` right again, where it has a form that can have one."""
    if isinstance(document, dict):
        document.pop("sha256", None)
        if (text := canonical(document)) is not None:
            document["sha256"] = sha256(text)[:digits]


def put(document: Document, path: tuple[Any, ...], new: Any) -> None:
    """Set a field, such as the hash of another file, where the document still has a place for it."""
    try:
        for key in path[:-1]:
            document = document[key]
        if isinstance(document, (dict, list)):
            document[path[-1]] = new
    except (KeyError, IndexError, TypeError):
        pass
