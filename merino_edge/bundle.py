"""A bundle: the folder that `export` writes and the runtime reads. It needs no ONNX library and no PyTorch.

    BUNDLE/manifest.json     kind "bundle", schema 1, the fields below
           model.onnx        model.onnx.data (weights)      tokenizer.json      chat.json
           model-C.onnx      same weights, with a cache of C positions: one for each of `contexts` but the last
           model-primitive.onnx, model-primitive-C.onnx: the same by the primitive lowering, beside native graphs
           model-genai.onnx, genai_config.json, tokenizer_config.json: for onnxruntime-genai, with export --genai
           engine-HASH.plan  compiled for the GPU that `engines` says (merino-edge build --capability)

| field of the manifest | what it holds |
|---|---|
| id, architecture | the model's shape, and its hash |
| precision, target, context | as exported; context: positions of the largest KV cache |
| files | {name: {"sha256", "bytes"}} of every other file |
| contexts | the capacity of every graph's KV cache, ascending |
| graph | opset, lowering, inputs, output, caches and their type |
| block_precisions | of each block's layers; null where all have `precision` |
| int4 | fast, block and rounding; null where nothing is int4 |
| raised_to_int8 | the int4 matrices that are int8 instead |
| odd_matrices | those whose inputs no block divides, and their precision; absent where there are none |
| vocabulary | a pruned vocabulary's sizes and times; null where every token is kept |
| float32_ffns | the FFNs that compute in float32 |
| made_from | the hash of the checkpoint |
| parity | the checks against PyTorch (merino_edge.export.parity) |
| compiled | what TensorRT for RTX said at export; null where it did not compile |
| engines, tunings | what `build` added (merino_edge.jetson.engine_build, merino_edge.runtime.thread_tuning) |

A reader ignores fields that it does not know. So a new field leaves the schema's number as it is.

Only plain files that the manifest names are used: no links, no folders, no `..`. Each graph is read before any library
opens it (merino_edge.onnx_graph). It may take weights from the listed `model.onnx.data` only, and use only the
operators that `export` writes. A user can allow others by name: MERINO_EDGE_ALLOW_OPERATORS=NAME,DOMAIN.NAME. A few
bundles come with the package (merino_edge/bundles) and are opened by name. An installer may have made hard links of
their files, so those are allowed there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from merino_edge import artefact, atomic, onnx_graph, wrong_kind
from merino_edge.architecture import Architecture
from merino_edge.bundle_forms import Manifest
from merino_edge.errors import ArtefactError

KIND = "bundle"
SCHEMA_VERSION = 1
WEIGHTS = "model.onnx.data"
MOST_NAME_BYTES = 255  # of a file's name, as file systems have it
ALLOWED_OPERATORS = "MERINO_EDGE_ALLOW_OPERATORS"  # an environment variable: names with commas between them
ENGINES = f"engine-{'[0-9a-f]' * 12}.plan"  # a pattern of file names
REQUIRED_FILES = ("model.onnx", "tokenizer.json", "chat.json")
PACKAGED = Path(__file__).parent / "bundles"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle folder: its architecture, how it was exported, and its manifest."""

    path: Path
    architecture: Architecture
    precision: str  # fp32 | fp16 | int8 | int4
    target: str  # where it runs, one of merino_edge.export.targets
    context: int  # positions the cache holds at most
    manifest: dict[str, Any]

    @property
    def graph(self) -> Path:
        """The graph with the largest cache."""
        return self.path / "model.onnx"

    @property
    def contexts(self) -> list[int]:
        """The cache capacities of its graphs in positions, ascending. The last is `context`."""
        return list(self.manifest.get("contexts", [self.context]))

    def graph_of(self, context: int) -> Path:
        """The graph whose cache has `context` positions, one of `contexts`."""
        return self.graph if context == self.context else self.path / smaller_graph(context)

    def primitive_graph_of(self, context: int) -> Path | None:
        """The same graph by the primitive lowering, for a TensorRT that cannot compile it; None where there is none."""
        name = primitive_graph(None if context == self.context else context)
        return self.path / name if name in self.manifest["files"] else None

    def onnx_sha256s(self, context: int) -> set[str]:
        """The hashes of the graphs of `context`, without their weights."""
        graphs = (self.graph_of(context), self.primitive_graph_of(context))
        return {self.manifest["files"][graph.name]["sha256"] for graph in graphs if graph is not None}

    def graph_sha256(self, context: int) -> str:
        """A hash of `graph_of(context)` and of its weights, which several graphs may share."""
        names = [self.graph_of(context).name, WEIGHTS]
        hashes = [self.manifest["files"][name]["sha256"] for name in names if name in self.manifest["files"]]
        return artefact.sha256_text(" ".join(hashes))

    @property
    def engines(self) -> list[dict[str, Any]]:
        """The engines in it, each {"file", "library", "version", ...}; others are in merino_edge.engine_store."""
        return list(self.manifest.get("engines", []))

    @property
    def tunings(self) -> list[dict[str, Any]]:
        """The best settings of ONNX Runtime, one entry for each machine they were measured on."""
        return list(self.manifest.get("tunings", []))

    def card(self) -> dict[str, Any]:
        """The bundle's identity, as a result that was made with it records it."""
        identity = {
            "id": self.architecture.id,
            "precision": self.precision,
            "target": self.target,
            "context": self.context,
        }
        return {**identity, "sha256": self.manifest.get("sha256")}


def smaller_graph(context: int) -> str:
    """The file name of a graph whose cache is smaller than the bundle's largest."""
    return f"model-{context}.onnx"


def primitive_graph(context: int | None = None) -> str:
    """The file name of a graph by the primitive lowering; `context`: of the smaller cache."""
    return "model-primitive.onnx" if context is None else f"model-primitive-{context}.onnx"


def write_manifest(folder: Path, a: Architecture, precision: str, target: str, context: int, **more: Any) -> None:
    """Write `manifest.json` with the hash of every file in `folder`; the last step of an export."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    files = {
        name: {"sha256": artefact.sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }
    head = {"id": a.id, "architecture": a.to_dict(), "precision": precision, "target": target, "context": context}
    artefact.write_json(folder / "manifest.json", KIND, {**head, "files": files, **more}, SCHEMA_VERSION)


def add_engine(
    bundle: Bundle, plan: bytes, entry: dict[str, Any], replaces: Callable[[dict[str, Any]], bool]
) -> Bundle:
    """Write a compiled engine beside the graph, name it in the manifest, and delete the engines that it `replaces`.

    The file is complete before the manifest names it. Old engines are deleted only after that, and so is what a killed
    build left: an engine that the manifest does not name. Raises OutputError.
    """
    name = f"engine-{hashlib.sha256(plan).hexdigest()[:12]}.plan"
    artefact.write_bytes(bundle.path / name, plan)
    removed = [old["file"] for old in bundle.engines if replaces(old) and old["file"] != name]
    kept = [old for old in bundle.engines if old["file"] not in (name, *removed)]
    files = {key: value for key, value in bundle.manifest["files"].items() if key not in removed}
    files[name] = {"sha256": artefact.sha256_file(bundle.path / name), "bytes": len(plan)}
    changed = _rewritten(bundle, files=files, engines=[*kept, {"file": name, **entry}])
    unnamed = {file.name for file in bundle.path.glob(ENGINES)} - files.keys()
    for old in {*removed, *unnamed}:
        (bundle.path / old).unlink(missing_ok=True)
    atomic.sweep(bundle.path)  # another compilation has another hash, and so another hidden name
    return changed


def add_tuning(bundle: Bundle, entry: dict[str, Any]) -> Bundle:
    """Put the best settings for a machine into the manifest; they replace earlier ones of that machine."""
    kept = [old for old in bundle.tunings if any(old.get(key) != entry[key] for key in ("cpu", "cores"))]
    return _rewritten(bundle, tunings=[*kept, entry])


def _rewritten(bundle: Bundle, **changed: Any) -> Bundle:
    payload = artefact.remove_envelope(bundle.manifest) | changed
    document = artefact.write_json(bundle.path / "manifest.json", KIND, payload, SCHEMA_VERSION)
    return replace(bundle, manifest=document)


def packaged() -> list[str]:
    """The names of the bundles in the package."""
    return sorted(folder.name for folder in PACKAGED.iterdir() if (folder / "manifest.json").is_file())


def find(path: Path | str) -> Path:
    """`path`, or the packaged bundle of this name where nothing exists at `path`."""
    path = Path(path)
    own = PACKAGED / path.name
    return own if not path.exists() and path.name == str(path) and own.is_dir() else path


def load(path: Path | str, *, verify: bool = True) -> Bundle:
    """Read the bundle that `find` gives. Raises ArtefactError.

    It checks every file's name and size, and with `verify` its sha256 too.
    """
    path = find(path)
    wrong_kind.require(path, KIND, packaged=packaged())
    if not path.is_dir():
        raise ArtefactError(f"{path} is not a bundle folder", "make one: merino-edge export CKPT --out BUNDLE")
    document = artefact.read_json(path / "manifest.json", KIND, SCHEMA_VERSION, form=Manifest)
    files = document.get("files")
    if not isinstance(files, dict) or any(name not in files for name in REQUIRED_FILES):
        raise ArtefactError(f"{path / 'manifest.json'} lists no {', '.join(REQUIRED_FILES)}", "export the bundle again")
    for name, entry in files.items():
        _check_file(path, name, entry, verify=verify, linked=path.parent == PACKAGED)
    for name in files:
        if name.endswith(".onnx"):
            _check_graph(path / name, files.get(WEIGHTS))
    a = Architecture.from_dict(document.get("architecture"))
    context = document.get("context")
    if not isinstance(context, int) or not 1 <= context <= a.max_positions:
        raise ArtefactError(f"{path}: context {context!r} does not fit the architecture", "export the bundle again")
    contexts = document.get("contexts", [context])
    if not isinstance(contexts, list) or any(type(c) is not int or c < 1 for c in contexts):
        raise ArtefactError(f"{path}: contexts {contexts!r} are no numbers of positions", "export the bundle again")
    if contexts[-1:] != [context] or contexts != sorted(set(contexts)):
        raise ArtefactError(f"{path}: contexts {contexts!r} do not end at {context}", "export the bundle again")
    if missing := [smaller_graph(c) for c in contexts[:-1] if smaller_graph(c) not in files]:
        raise ArtefactError(f"{path / 'manifest.json'} lists no {missing[0]}", "export the bundle again")
    engines = document.get("engines", [])
    if not isinstance(engines, list) or not all(isinstance(e, dict) and e.get("file") in files for e in engines):
        raise ArtefactError(f"{path}: its engines are not those of its files", "build them again: merino-edge build")
    tunings = document.get("tunings", [])
    if not isinstance(tunings, list) or not all(isinstance(entry, dict) for entry in tunings):
        raise ArtefactError(f"{path}: tunings {tunings!r} are no entries", "measure again: merino-edge build")
    return Bundle(path, a, str(document.get("precision")), str(document.get("target")), context, document)


def _check_file(folder: Path, name: str, entry: Any, *, verify: bool, linked: bool) -> None:
    file = folder / name
    too_long = len(name.encode(errors="replace")) > MOST_NAME_BYTES
    if PurePath(name).name != name or name in (".", "..") or too_long or not isinstance(entry, dict):
        raise ArtefactError(
            f"{folder / 'manifest.json'} names {name[:80]!r}, which is not a plain file", "do not use this bundle"
        )
    if file.is_symlink() or not file.is_file():
        raise ArtefactError(f"{file} is missing or not a plain file", "export or copy the bundle again")
    if file.stat().st_nlink > 1 and not linked:
        raise ArtefactError(f"{file} is linked to a file elsewhere", "copy the bundle, without hard links")
    if file.stat().st_size != entry.get("bytes"):
        raise ArtefactError(
            f"{file} has {file.stat().st_size} bytes, not {entry.get('bytes')}", "copy the bundle again"
        )
    if verify and artefact.sha256_file(file) != entry.get("sha256"):
        raise ArtefactError(f"{file} does not match its sha256", "it was altered; export or copy the bundle again")


def _check_graph(graph: Path, weights: Any) -> None:
    """Refuse a graph that reads bytes outside `weights`, the manifest's entry, or uses an operator not allowed."""
    found = onnx_graph.read(graph)
    for tensor in sorted(found.external, key=lambda tensor: (tensor.location == WEIGHTS, tensor.location)):
        if tensor.location != WEIGHTS or weights is None:
            raise ArtefactError(f"{graph} reads weights from {tensor.location[:80]!r}", "do not use this bundle")
        if tensor.offset + (tensor.length or 0) > weights["bytes"]:
            raise ArtefactError(f"{graph} reads beyond the end of {WEIGHTS}", "export or copy the bundle again")
    allowed = onnx_graph.OPERATORS | set(os.environ.get(ALLOWED_OPERATORS, "").split(","))
    if unknown := sorted(found.operators - allowed):
        raise ArtefactError(
            f"{graph} uses the operator {unknown[0][:80]!r}, which export does not write",
            f"do not use it, or allow it by name: {ALLOWED_OPERATORS}={unknown[0][:80]}",
        )
