"""Prompt cache file: the keys and values of a prompt, so that a later prompt with the same prefix need not run it.

A session that loads the file holds its tokens. A later prompt reuses the common prefix (merino_edge.runtime.session),
so the file of another prompt does no harm. ONNX Runtime and TensorRT read each other's files of one bundle. The file is
one line of JSON and then the arrays [Hkv, P, D], one after the other. Behind them stand the states of short
convolutions, the newest positions [1, P', W] of each such layer, float32.

    {"kind": "prompt_cache", "schema_version": 1, "tool_version", "model": hash of the graph's files, "tokens": [P ids],
     "dtype": "float32", "shapes": [[Hkv, D], ...], "arrays_sha256", "sha256" of all this}
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import artefact, forms, limits
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.forms import Form, Line
from merino_edge.runtime.engine import CacheEngine, WindowedEngine
from merino_edge.runtime.engines.convolution_states import LAST_PAIR
from merino_edge.runtime.session import Session

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle

KIND = "prompt_cache"
AGAIN = "delete it, and it will be written again"
LEFT_BEHIND = "windows or short convolutions have left the prompt behind, so no prompt cache is written"
AGAIN_SHORTER = "write it with --max-tokens 1"


class Header(Form):
    """The first line of the file."""

    model: Line
    tokens: list[forms.Count]
    dtype: Line
    shapes: list[tuple[forms.Count, forms.Count]]
    arrays_sha256: Line


def model_hash(bundle: Bundle) -> str:
    """Hash of the graph and its weights, on which keys and values depend."""
    files = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items() if ".onnx" in name}
    return artefact.sha256_text(artefact.canonical_json(files))


def save(path: Path, session: Session, positions: int, bundle: Bundle) -> None:
    """Write the first `positions` of the session's cache to `path`.

    Raises UnsupportedError (the engine cannot read its cache, or has left these positions behind), OutputError.
    """
    if not is_held(session, positions):
        raise UnsupportedError(LEFT_BEHIND, AGAIN_SHORTER)
    arrays = _engine(session).read_cache(positions)
    data = b"".join(array.tobytes() for array in arrays)
    header = {
        "model": model_hash(bundle),
        "tokens": session.ids[:positions],
        "dtype": arrays[0].dtype.name,
        "shapes": [[array.shape[0], array.shape[2]] for array in arrays],
        "arrays_sha256": hashlib.sha256(data).hexdigest(),
    }
    line = artefact.canonical_json(artefact.add_envelope(KIND, header)) + "\n"
    artefact.write_bytes(path, line.encode() + data)


def load(path: Path, session: Session, bundle: Bundle) -> int:
    """Load the file into an empty session and return its number of tokens.

    Raises ArtefactError (another model's file, an altered one, one longer than the context), UnsupportedError.
    """
    engine = _engine(session)
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise ArtefactError(f"{path} is not a plain file", "give another --prompt-cache")
    try:
        with open(path, "rb") as file:
            header = _header(file.readline(limits.MAX_JSON_BYTES), str(path))
            tokens = header["tokens"]
            if header["model"] != model_hash(bundle):
                raise ArtefactError(f"{path} was written for another model than {bundle.path}", AGAIN)
            if not 0 < len(tokens) <= engine.max_positions:
                raise ArtefactError(f"{path} has {len(tokens)} positions of {engine.max_positions}", AGAIN)
            if max(tokens, default=0) >= bundle.architecture.vocab_size:
                raise ArtefactError(f"{path} holds tokens that the model does not know", AGAIN)
            shapes = engine.cache_shapes(len(tokens))
            stored = [(heads, width) for heads, _, width in shapes]
            if header["dtype"] != engine.cache_dtype.name or [tuple(shape) for shape in header["shapes"]] != stored:
                raise ArtefactError(f"{path} has caches of another shape", AGAIN)
            dtypes = _dtypes(engine, bundle, len(shapes))
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
            data = file.read(size + 1)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})", "check the path") from None
    if len(data) != size or hashlib.sha256(data).hexdigest() != header["arrays_sha256"]:
        raise ArtefactError(f"{path} is truncated or altered", AGAIN)
    arrays, at = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        array = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        if not np.isfinite(array).all():
            raise ArtefactError(f"{path} holds NaN or infinity", AGAIN)
        arrays.append(array)
        at += array.nbytes
    with session.use:
        engine.write_cache(arrays)
        session.hold(tokens)
    return len(tokens)


def _header(line: bytes, where: str) -> dict[str, Any]:
    try:
        document = artefact.parse_json(line.decode(), where)
    except (UnicodeDecodeError, ArtefactError):
        document = None
    header = artefact.check_header(document, KIND, 1, where)
    forms.check(header, Header, f"{where} is not a prompt cache of merino-edge", AGAIN)
    return header


def _dtypes(engine: CacheEngine, bundle: Bundle, arrays: int) -> list[np.dtype[Any]]:
    """The type of each array: that of keys and values, and float32 of the states behind them."""
    states = sum(block.convolution > 0 for block in bundle.architecture.layer_blocks())
    return [engine.cache_dtype] * (arrays - states) + [np.dtype(np.float32)] * states


def is_held(session: Session, positions: int) -> bool:
    """Whether the engine still has what a later start at the end of the first `positions` needs.

    Layers with a window, and short convolutions, leave the prompt behind when the answer is long.
    """
    return not isinstance(session.engine, WindowedEngine) or max(0, positions - LAST_PAIR) >= session.engine.least_start


def _engine(session: Session) -> CacheEngine:
    if not isinstance(session.engine, CacheEngine):
        raise UnsupportedError("this engine cannot save its cache", "leave --prompt-cache out")
    return session.engine
