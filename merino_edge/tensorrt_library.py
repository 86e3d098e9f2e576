"""TensorRT's Python module, full or for RTX, and a logger that keeps the first error instead of printing it.

Both libraries have one interface. The callers ask the module what it lacks (`hasattr`) and never read its version.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from merino_edge.errors import MissingExtraError, require

TENSORRT, RTX = "tensorrt", "tensorrt_rtx_bindings"
EXTRAS = {TENSORRT: "tensorrt", RTX: "rtx"}  # pip extra by module


def installed() -> str:
    """The name of the installed TensorRT module; the full one is preferred. Raises MissingExtraError."""
    for library in EXTRAS:
        if find_spec(library) is not None:
            return library
    raise MissingExtraError(
        "this needs TensorRT, which Python does not find",
        "on a Jetson: python3 -m venv --system-site-packages VENV; "
        "on a PC with an RTX GPU: pip install 'merino-edge[rtx]'",
    )


def load(library: str) -> tuple[Any, Any]:
    """The library's module, and a logger whose `first` is the first error. Raises MissingExtraError."""
    require(library, EXTRAS[library])
    trt = import_module(library)

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        first = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and self.first == Log.first:
                self.first = message.splitlines()[0]

    return trt, Log()
