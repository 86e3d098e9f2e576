"""Reading and writing of artefacts: versioned JSON with its own hash. merino_edge.atomic writes the files.

A JSON artefact is one object: its content in an envelope of kind, versions and hash.

    {"kind": "architecture", "schema_version": 1, "tool_version": "0.1.0", ..., "sha256": "..."}

`sha256` is taken over the canonical JSON (sorted keys, no spaces) of everything else, so a flipped bit is found. A kind
that people write by hand may leave `sha256` out. Reading is strict (merino_edge.strict_json), and the fields of each
kind must have the form that its room declares (merino_edge.forms). This module knows no kind of artefact.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from merino_edge import __version__, forms, limits, names, wrong_kind
from merino_edge.atomic import translate_os_errors as translate_os_errors
from merino_edge.atomic import write_bytes as write_bytes
from merino_edge.errors import ArtefactError, InputError
from merino_edge.forms import Form
from merino_edge.strict_json import parse_json as parse_json

ENVELOPE = ("kind", "schema_version", "tool_version", "sha256")


def canonical_json(value: Any) -> str:
    """The canonical text of a JSON value, over which hashes are taken."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """The sha256 of the UTF-8 text, in hexadecimal. Raises InputError for half characters, as in names of files."""
    try:
        return sha256_bytes(text.encode())
    except UnicodeEncodeError:
        raise InputError("a name or text is not valid UTF-8", "rename the file") from None


def sha256_bytes(data: bytes) -> str:
    """The sha256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of the file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --- reading ---------------------------------------------------------------------------------------


def read_head(path: Path, size_bytes: int = 4096) -> bytes:
    """The first bytes of a plain file; b"" where it cannot be read."""
    try:
        if not path.is_file():
            return b""
        with open(path, "rb") as file:
            return file.read(size_bytes)
    except OSError:
        return b""


def read_text(path: Path, limit_bytes: int = limits.MAX_JSON_BYTES) -> str:
    """Read a UTF-8 file of at most `limit_bytes`. Raises ArtefactError."""
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ArtefactError(f"{path} is a folder, a file was expected", "see: merino-edge show PATH")
        if not path.is_file():  # a pipe would wait for ever, a device never end
            raise ArtefactError(f"{path} is not a plain file", "copy it to one")
        if size > limit_bytes:
            raise ArtefactError(f"{path} has {size} bytes, the limit is {limit_bytes}", "see merino_edge/limits.py")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtefactError(f"{path} does not exist", names.beside(path) or "check the path") from None
    except UnicodeDecodeError:
        raise ArtefactError(f"{path} is not UTF-8 text", "is it an artefact of merino-edge?") from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None


def check_header(document: Any, kind: str, newest: int, where: str, *, handwritten: bool = False) -> dict[str, Any]:
    """Return `document` if it is an object of this kind, no newer than `newest`, and its hash is right.

    A `handwritten` kind may leave the hash out. Raises ArtefactError naming `where`.
    """
    if not isinstance(document, dict):
        raise ArtefactError(f"{where} is not a {kind} artefact", "see: merino-edge show PATH")
    if document.get("kind") != kind:
        raise wrong_kind.error(Path(where), str(document.get("kind")), kind)
    version = document.get("schema_version")
    if type(version) is not int or version < 1:
        raise ArtefactError(f"{where} has no schema version", "make it again")
    if version > newest:
        raise ArtefactError(
            f"{where} has schema version {version}, this tool knows up to {newest}",
            "run: pip install -U merino-edge",
        )
    if "sha256" in document or not handwritten:
        body = {key: value for key, value in document.items() if key != "sha256"}
        if sha256_text(canonical_json(body)) != document.get("sha256"):
            raise ArtefactError(f"{where} does not match its own sha256", "it was altered; make it again")
    return document


def read_json(
    path: Path | str, kind: str, newest: int = 1, *, handwritten: bool = False, form: type[Form] | None = None
) -> dict[str, Any]:
    """Read a JSON artefact, verify it as `check_header` does, and return it. Its fields must have the `form`.

    Raises ArtefactError.
    """
    path = Path(path)
    value = parse_json(read_text(path, limits.MAX_ARTEFACT_BYTES), str(path), limits.MAX_ARTEFACT_VALUES)
    document = check_header(value, kind, newest, str(path), handwritten=handwritten)
    if form is not None:
        forms.check(document, form, str(path))
    return document


def remove_envelope(document: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON artefact, without the fields that `add_envelope` adds."""
    return {key: value for key, value in document.items() if key not in ENVELOPE}


# --- writing ---------------------------------------------------------------------------------------


def add_envelope(kind: str, payload: dict[str, Any], schema_version: int = 1) -> dict[str, Any]:
    """`payload` with kind, versions and hash: the object that `read_json` accepts."""
    document = {"kind": kind, "schema_version": schema_version, "tool_version": __version__, **payload}
    return {**document, "sha256": sha256_text(canonical_json(document))}


def write_json(path: Path | str, kind: str, payload: dict[str, Any], schema_version: int = 1) -> dict[str, Any]:
    """Write a JSON artefact atomically and return what was written. Raises OutputError."""
    document = add_envelope(kind, payload, schema_version)
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return document


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 file atomically. Raises OutputError."""
    write_bytes(path, text.encode())


def user_cache() -> Path:
    """The user's cache folder: for downloads and other files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merino-edge"


def is_artefact_folder(path: Path) -> bool:
    """Whether this is a checkpoint or bundle folder: each of them holds a file that tells."""
    return (path / "manifest.json").is_file() or (path / "architecture.json").is_file()
