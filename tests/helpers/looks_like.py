"""Things that look like an artefact of a kind at first sight, and hold nothing."""

from __future__ import annotations

import json
from pathlib import Path

from merino_edge import artefact, wrong_kind


def looks_like(kind: str, folder: Path) -> Path:
    """A file or folder of this name and kind in `folder`."""
    marker = next((name for name, own in wrong_kind.FOLDERS.items() if own == kind), None)
    path = folder / kind
    if marker is not None:
        path.mkdir()
        more = {"model_type": "llama"} if kind == "huggingface" else {"kind": kind, "schema_version": 1}
        (path / marker).write_text(json.dumps(more))
    elif kind == "gguf":
        path.write_bytes(b"GGUF\3")
    else:
        artefact.write_json(path, kind, {"more": "x" * 9999})
    return path
