"""TensorRT's Python module, full or for RTX, and a logger that keeps the first error instead of printing it.

Both libraries have one interface. The callers ask the module what it lacks (`hasattr`), and read its version only
where an ONNX parser hides what it takes. What keeps a library from being used is one typed line that names the cause.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merino_edge.errors import MissingExtraError, UnsupportedError, mapping_failure

TENSORRT, RTX = "tensorrt", "tensorrt_rtx_bindings"
RTX_LIBRARIES = "tensorrt_rtx_libs"  # the package of the RTX wheel's libraries
EXTRAS = {TENSORRT: "tensorrt", RTX: "rtx"}  # pip extra by module
NO_REASON = "no reason given"
NO_MEMORY = "std::bad_alloc"  # in what the C++ library says, of this machine's memory, not the GPU's
VENV = "python3 -m venv --system-site-packages VENV"


def is_installed(library: str) -> bool:
    """Whether Python finds `library`, a module of EXTRAS."""
    return library in EXTRAS and find_spec(library) is not None


def installed() -> str:
    """The name of the installed TensorRT module; the full one is preferred. Raises MissingExtraError."""
    for library in EXTRAS:
        if is_installed(library):
            return library
    pip = "" if _is_arm() else "; on a PC with an RTX GPU: pip install 'merino-edge[rtx]'"
    raise MissingExtraError("this needs TensorRT, which Python does not find", f"{install_hint(TENSORRT)}{pip}")


def install_hint(library: str, root: Path = Path("/"), machine: str = "") -> str:
    """How this machine gets `library`, or why its Python does not see it.

    On ARM it is never pip: its newest TensorRT is for another CUDA than a JetPack has. `root`: where the file system
    stands; `machine`: the processor, this one's if empty.
    """
    if not _is_arm(machine):
        return f"run: pip install 'merino-edge[{EXTRAS[library]}]'"
    if library == RTX:
        return "TensorRT for RTX is for PCs; on a Jetson leave the backend to the board's own TensorRT"
    folders = sorted(root.glob("usr/lib/python3*/dist-packages/tensorrt"))
    if not folders:
        return f"on a Jetson: sudo apt install python3-libnvinfer, then {VENV}"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    theirs = [folder.parts[-3].removeprefix("python") for folder in folders]
    if here in theirs or "3" in theirs:  # python3 is the system's, whatever its number
        return f"this environment does not see {folders[0]}; make it with: {VENV}"
    return (
        f"the system's TensorRT is for Python {theirs[0]}, this is {here}; make the environment with: "
        + VENV.replace("python3", f"python{theirs[0]}")
    )


def load(library: str) -> tuple[Any, Any]:
    """The library's module, and a logger (`new_log`).

    Raises MissingExtraError where the library is not installed, UnsupportedError with the cause where it cannot be
    imported.
    """
    if find_spec(library) is None:
        raise MissingExtraError(f"this needs the package {library}, which is not installed", install_hint(library))
    try:
        trt = import_module(library)
    except (ImportError, OSError) as error:
        if (unmapped := mapping_failure(_of_own_library(error))) is not None:
            raise unmapped from None
        raise UnsupportedError(f"{library} cannot be imported ({error})", _import_hint(library, error)) from None

    return trt, new_log(trt)


def _of_own_library(error: Exception) -> Exception:
    """What keeps a library of the RTX wheel from being loaded, where the bindings only say that they lack it.

    The wheel loads its libraries itself, and swallows why one cannot be loaded.
    """
    lacking = re.match(r"(lib[\w.]+): cannot open shared object file", str(error))
    wheel = find_spec(RTX_LIBRARIES)
    for folder in (wheel.submodule_search_locations if lacking and wheel else None) or []:
        if lacking and (file := Path(folder, lacking[1])).is_file():
            try:
                ctypes.CDLL(str(file))
            except OSError as its_own:
                return its_own
    return error


def new_log(trt: Any) -> Any:
    """A logger for the library's module `trt`: its `first` is the first error since it was made or since `forget()`."""

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        first = NO_REASON

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and self.first == NO_REASON:
                self.first = message.splitlines()[0]

        def reason(self) -> str:
            """The first error, as what failed because of it names it. Raises MemoryError where it was that."""
            if NO_MEMORY in self.first:
                raise MemoryError
            return self.first

        def forget(self) -> None:
            """Errors up to now did no harm; a later one is the reason of a later failure."""
            self.first = NO_REASON

    return Log()


def start(kind: Callable[[Any], Any], log: Any) -> Any:
    """A Builder or a Runtime: `kind` over `log`. Raises UnsupportedError where CUDA cannot start."""
    try:
        return kind(log)
    except TypeError:  # the bindings' way to say that the C++ library gave no object
        raise UnsupportedError(
            f"TensorRT cannot start: {log.reason()}",
            "merino-edge doctor says what the GPU lacks; merino-edge generate BUNDLE --cpu runs without it",
        ) from None


def _is_arm(machine: str = "") -> bool:
    return (machine or platform.machine()) in ("aarch64", "arm64")


def _import_hint(library: str, error: Exception) -> str:
    text = str(error)
    if "libnvdla_compiler" in text:  # JetPack 6's bindings need it, and it is the host that has it
        return (
            "in a container: docker run --runtime nvidia; on JetPack 7 choose an image of JetPack 7, since a "
            "JetPack 6 image needs a file that its host no longer has"
        )
    found = re.search(r"compiled for Python (\d+\.\d+)", text)
    if found or (isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(f"{library}.")):
        theirs = f"Python {found[1]}" if found else "another Python"
        python = f"python{found[1]}" if found else "the system's python3"
        return f"it was built for {theirs}; make the environment with {python} -m venv --system-site-packages VENV"
    if re.search(r"lib(nv|cu)\w*\.so", text):
        return "a library is missing: in a container use --runtime nvidia; else install it again with its package"
    return install_hint(library)
