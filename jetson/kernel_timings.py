"""Kernel timings: the timing cache of a TensorRT library on this board in its power mode.

Builds and profiles share it, so a kernel is timed once. The file lies in the engine store and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from merino_edge import artefact, engine_store, tensorrt_library
from merino_edge.errors import OutputError


def machine_hash(library: str, card: dict[str, Any]) -> str:
    """A hash of what timings and engines are tied to: the library with its release, the board and its power mode."""
    trt, _ = tensorrt_library.load(library)
    identity = json.dumps([library, trt.__version__, *(card[key] for key in ("module", "power_mode", "gpu"))])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


class KernelTimings:
    """The timings in `data`; `keep` writes newer ones."""

    def __init__(self, library: str, card: dict[str, Any]) -> None:
        self.path = engine_store.store_folder() / f"timings-{machine_hash(library, card)}.bin"
        self.data = self.path.read_bytes() if self.path.is_file() else b""

    def keep(self, data: bytes) -> str:
        """Write `data`; a warning where the disk refuses it, else "". TensorRT for RTX has none: b"" is not written."""
        if not data or data == self.data:
            return ""
        self.data = data
        try:
            artefact.write_bytes(self.path, data)
        except OutputError as error:
            return f"the next build will take as long: {error}"
        return ""
