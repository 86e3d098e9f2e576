"""Bundles whose graph reads weights outside the bundle: python benchmarks/external_data.py [--unchecked]

The name of a tensor's file is spelled in many ways, and such tensors are put in every place of a graph. Each is written
with each kind of file outside. The bundle's manifest vouches for the graph. The columns say whether the bundle is
refused and, where it is not, whether ONNX Runtime opened it. With --unchecked our own check is left out, so that the
table shows what the installed ONNX Runtime would do. It needs ONNX Runtime, but no onnx. The bundle is lamb.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from merino_edge import artefact, bundle
from merino_edge.errors import MerinoError

KEY, VALUE = 1, 2  # fields of an entry
GRAPH, INITIALIZER, EXTERNAL_DATA, SPARSE = 7, 5, 13, 15
LONGEST_NUMBER = 10  # bytes
OURS = bundle.WEIGHTS.encode()

Change = Callable[[bytes], bytes]  # of the whole graph


def varint(value: int, length: int = 0) -> bytes:
    """A number; filled up with zeros to `length` bytes."""
    parts = [value & 127]
    while value := value >> 7:
        parts.append(value & 127)
    parts += [0] * (length - len(parts))
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])


def piece(number: int, content: bytes, *, tag_bytes: int = 0, size_bytes: int = 0) -> bytes:
    """A field that holds text or a message."""
    return varint(number << 3 | 2, tag_bytes) + varint(len(content), size_bytes) + content


def split(message: bytes) -> list[tuple[int, bytes, bytes | None]]:
    """(number, the whole field, its content where it is text or a message) of each field of a plain message."""

    def number_at(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    fields, at = [], 0
    while at < len(message):
        begin = at
        tag, at = number_at(at)
        content = None
        if tag & 7 == 2:
            size, at = number_at(at)
            content, at = message[at : at + size], at + size
        elif tag & 7 == 0:
            _, at = number_at(at)
        else:
            at += 8 if tag & 7 == 1 else 4
        fields.append((tag >> 3, message[begin:at], content))
    return fields


def changed(message: bytes, path: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """`message` with `change` applied to every field at `path`; the field's whole bytes are replaced."""
    number, *rest = path
    parts = []
    for found, whole, content in split(message):
        if found != number or content is None:
            parts.append(whole)
        elif rest:
            parts.append(piece(found, changed(content, tuple(rest), change)))
        else:
            parts.append(change(content))
    return b"".join(parts)


# How an entry can be spelled whose key is "location" and whose value is not the bundle's file.
SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda name: piece(KEY, b"location") + piece(VALUE, name),
    "value first": lambda name: piece(VALUE, name) + piece(KEY, b"location"),
    "long key size": lambda name: piece(KEY, b"location", size_bytes=2) + piece(VALUE, name),
    "long key tag": lambda name: piece(KEY, b"location", tag_bytes=3) + piece(VALUE, name),
    "long value size": lambda name: piece(KEY, b"location") + piece(VALUE, name, size_bytes=3),
    "longest value size": lambda name: piece(KEY, b"location") + piece(VALUE, name, size_bytes=LONGEST_NUMBER),
    "long value tag": lambda name: piece(KEY, b"location") + piece(VALUE, name, tag_bytes=5),
    "value twice": lambda name: piece(KEY, b"location") + piece(VALUE, OURS) + piece(VALUE, name),
    "key twice": lambda name: piece(KEY, b"offset") + piece(KEY, b"location") + piece(VALUE, name),
    "unknown text between": lambda name: piece(KEY, b"location") + piece(3, b"") + piece(VALUE, name),
    "unknown number first": lambda name: varint(9 << 3) + b"\x01" + piece(KEY, b"location") + piece(VALUE, name),
    "group between": lambda name: piece(KEY, b"location") + b"\x23\x24" + piece(VALUE, name),
    "number as a value before": lambda name: piece(KEY, b"location") + b"\x10\x01" + piece(VALUE, name),
}


def _respelled(spell: Callable[[bytes], bytes]) -> Callable[[str], Change]:
    def entry(content: bytes, name: bytes) -> bytes:
        is_location = (KEY, b"location") in [(number, text) for number, _, text in split(content)]
        return piece(EXTERNAL_DATA, spell(name) if is_location else content)

    def change(name: str) -> Change:
        path = (GRAPH, INITIALIZER, EXTERNAL_DATA)
        return lambda graph: changed(graph, path, lambda content: entry(content, name.encode()))

    return change


def _external(name: bytes, tensor: bytes = b"outside") -> bytes:
    """A tensor of 16 float32 in another file."""
    location = piece(EXTERNAL_DATA, piece(KEY, b"location") + piece(VALUE, name))
    return b"\x08\x10" + b"\x10\x01" + piece(8, tensor) + location + b"\x70\x01"


def _node(attribute: bytes) -> bytes:
    """A Constant, which gives its attribute."""
    return piece(2, b"outside.value") + piece(4, b"Constant") + piece(5, attribute)


def _in_graph(number: int, content: Callable[[bytes], bytes]) -> Callable[[str], Change]:
    return lambda name: lambda graph: graph + piece(GRAPH, piece(number, content(name.encode())))


def _in_model(number: int, content: Callable[[bytes], bytes]) -> Callable[[str], Change]:
    return lambda name: lambda graph: graph + piece(number, content(name.encode()))


def _merged(number: int, content: Callable[[bytes], bytes]) -> Callable[[str], Change]:
    """Put a field into the one graph there is."""

    def change(name: str) -> Change:
        return lambda graph: changed(
            graph, (GRAPH,), lambda content_: piece(GRAPH, content_ + piece(number, content(name.encode())))
        )

    return change


def _tensor_attribute(name: bytes) -> bytes:
    return piece(1, b"value") + piece(5, _external(name)) + b"\xa0\x01\x04"


def _sparse(name: bytes) -> bytes:
    indices = b"\x08\x10" + b"\x10\x07" + piece(8, b"at") + piece(9, bytes(128))
    return piece(1, _external(name)) + piece(2, indices) + b"\x18\x20"


def _subgraph_node(name: bytes) -> bytes:
    inner = piece(1, _node(_tensor_attribute(name))) + piece(2, b"inner") + piece(5, _external(name, b"inner"))
    return piece(2, b"y") + piece(4, b"If") + piece(5, piece(1, b"then_branch") + piece(6, inner) + b"\xa0\x01\x05")


def _function(name: bytes) -> bytes:
    return piece(1, b"F") + piece(5, b"y") + piece(7, _node(_tensor_attribute(name))) + piece(10, b"outside")


# Where in a graph a tensor can name a file.
PLACES: dict[str, Callable[[str], Change]] = {
    "initializer": _merged(INITIALIZER, _external),
    "second graph": _in_graph(INITIALIZER, _external),
    "sparse initializer": _merged(SPARSE, _sparse),
    "attribute": _merged(1, lambda name: _node(_tensor_attribute(name))),
    "tensors of an attribute": _merged(1, lambda name: _node(piece(1, b"v") + piece(10, _external(name)))),
    "sparse attribute": _merged(1, lambda name: _node(piece(1, b"sparse_value") + piece(22, _sparse(name)))),
    "subgraph": _merged(1, _subgraph_node),
    "subgraphs of an attribute": _merged(1, lambda name: _node(piece(1, b"g") + piece(11, piece(5, _external(name))))),
    "function": _in_model(25, _function),
    "training": _in_model(20, lambda name: piece(1, piece(5, _external(name)))),
}
WAYS = {**{name: _respelled(spell) for name, spell in SPELLINGS.items()}, **PLACES}


def _outside(kind: str, folder: Path, name: str) -> str:
    """Put a file of weights where `kind` says. Returns the name for it in the graph."""
    secret = folder.parent / f"{name}.secret"
    shutil.copy(folder / bundle.WEIGHTS, secret)
    if kind == "above":
        return f"../{secret.name}"
    if kind == "absolute":
        return str(secret)
    if kind == "unlisted":
        shutil.copy(secret, folder / "more.bin")
    elif kind == "link":
        (folder / "more.bin").symlink_to(secret)
    elif kind == "hard link":
        os.link(secret, folder / "more.bin")
    elif kind == "linked folder":
        (folder / "more").symlink_to(folder.parent)
        return f"more/{secret.name}"
    elif kind == "around":
        return f"./../{folder.name}/../{secret.name}"
    return "more.bin"


KINDS = ("unlisted", "above", "absolute", "link", "linked folder", "hard link", "around")


def written(folder: Path, name: str) -> Iterator[tuple[str, str, Path]]:
    """(way, kind, bundle) for each way of naming a file and each kind of file outside, one at a time."""
    for way, change in WAYS.items():
        for kind in KINDS:
            target = folder / name
            shutil.copytree(bundle.find("lamb"), target)
            graph = target / "model.onnx"
            graph.write_bytes(change(_outside(kind, target, name))(graph.read_bytes()))
            vouch(target)
            yield way, kind, target
            shutil.rmtree(target)
            (folder / f"{name}.secret").unlink()


def vouch(folder: Path) -> None:
    """Write the present hashes of the listed files into the manifest, as the bundle's maker could."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        name: {"sha256": artefact.sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in manifest["files"]
    }
    payload = artefact.remove_envelope(manifest) | {"files": files}
    artefact.write_json(folder / "manifest.json", bundle.KIND, payload, bundle.SCHEMA_VERSION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unchecked", action="store_true", help="leave our own check out")
    options = parser.parse_args()
    import onnxruntime

    from merino_edge.runtime.open_bundle import open_engine

    if options.unchecked:
        bundle._check_graph = lambda graph, weights: None
    accepted = ran = count = 0
    print(f"ONNX Runtime {onnxruntime.__version__}, {'without' if options.unchecked else 'with'} our check")
    with tempfile.TemporaryDirectory() as name:
        for way, kind, folder in written(Path(name), "b"):
            count += 1
            try:
                bundle.load(folder)
                said, accepted = "accepted", accepted + 1
            except MerinoError as error:
                said = f"refused: {error.message.replace(str(folder), 'b')[:90]}"
            if said == "accepted":
                try:
                    engine, _, _ = open_engine(folder, 1)
                    engine.close()
                    said, ran = "accepted, and ONNX Runtime opened it", ran + 1
                except MerinoError as error:
                    said = f"accepted; {error.message.replace(str(folder), 'b')[:110]}"
            print(f"{way:26} {kind:14} {said}")
    print(f"{accepted} of {count} accepted, {ran} opened")
    sys.exit(1 if accepted and not options.unchecked else 0)


if __name__ == "__main__":
    main()
