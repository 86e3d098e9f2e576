"""Providers: the Python packages through which `Cuda` calls NVIDIA's driver.

| package | where it comes from |
|---|---|
| PyCUDA (`pycuda`) | JetPack's containers carry it; elsewhere pip compiles it, which needs CUDA's toolkit |
| cuda-bindings (`cuda.bindings`) | wheels for x86 and aarch64 |

Both are used through the driver API only. The CUDA runtime library of a newer toolkit refuses an older driver, and the
wheels' own one is not built for a Jetson. PyCUDA is taken where both are installed. All methods raise UnsupportedError
with CUDA's name for the error. A call needs the device's context to be current on its thread: see `push`.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from merino_edge.errors import MerinoError, MissingExtraError, UnsupportedError

PROVIDERS = {"pycuda": "pycuda_provider", "cuda.bindings": "bindings_provider"}  # module by package, in order
HINTS = {
    "CUDA_ERROR_NO_DEVICE": "start the container with --runtime nvidia, or use a backend for the CPU",
    "CUDA_ERROR_OUT_OF_MEMORY": "close programs, or build the engine with less --context",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "restart: the driver was updated while the system ran",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "start the program again, and report it",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "update CUDA's toolkit: its compiler does not know this GPU",
}


class Rows(NamedTuple):
    """Rows in the GPU's memory; `pitch` is the distance of two of them in bytes."""

    address: int
    pitch: int


class Launch(NamedTuple):
    """How a kernel runs. The first `pointers` arguments are pointers, the others are 32-bit integers."""

    grid: tuple[int, int]  # blocks
    threads: int  # of a block
    arguments: tuple[int, ...]
    pointers: int


class Provider(Protocol):
    """The driver calls of an engine on the first GPU. Addresses, streams and sizes in bytes are plain integers."""

    name: str

    def attribute(self, name: str) -> int:
        """An attribute of the device, by the driver's name without CU_DEVICE_ATTRIBUTE_."""

    def retain(self) -> None:
        """Take the device's primary context, which TensorRT and PyTorch use too."""

    def release(self) -> None:
        """Give the context back."""

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the device."""

    def push(self) -> None:
        """Make the retained context current on this thread, until `pop`."""

    def pop(self) -> None: ...

    def new_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def fill(self, address: int, value: int, size: int, stream: int) -> None: ...

    def pin(self, size: int) -> int:
        """Allocate host memory that the GPU sees too, and return the host's address."""

    def unpin(self, host: int) -> None: ...
    def device_address(self, host: int) -> int: ...
    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None: ...
    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None: ...
    def copy_rows(self, source: Rows, target: Rows, width: int, count: int, stream: int) -> None:
        """Queue a copy of `count` rows of `width` bytes within the GPU."""

    def load(self, binary: bytes, name: str) -> Any:
        """The kernel `name` of a compiled module, for `start` and `unload`."""

    def unload(self, kernel: Any) -> None: ...

    def start(self, kernel: Any, launch: Launch, stream: int) -> None: ...
    def begin_capture(self, stream: int) -> None: ...

    def end_capture(self, stream: int) -> Any:
        """The recorded CUDA graph, ready for `launch`. The stream leaves the capture mode in any case."""

    def launch(self, graph: Any, stream: int) -> None: ...
    def destroy_graph(self, graph: Any) -> None: ...


def installed() -> list[str]:
    """The packages that are installed, the preferred one first. Raises MissingExtraError where there is none."""
    found = []
    for package in PROVIDERS:
        with suppress(ModuleNotFoundError):  # no package `cuda` to look into
            found += [package] if find_spec(package) is not None else []
    if not found:
        raise MissingExtraError(
            "this needs PyCUDA or the package cuda-bindings, and neither is installed",
            "run: pip install 'merino-edge[jetson]'",
        )
    return found


def open_provider(package: str = "") -> Provider:
    """Start the driver through `package`; by default through the first that is installed and can be loaded.

    Raises UnsupportedError where there is no driver or no GPU, MissingExtraError without a package.
    """
    reasons = []
    for name in [package] if package else installed():
        try:
            provider: Provider = import_module(f"merino_edge.runtime.cuda.{PROVIDERS[name]}").open_device()
            return provider
        except MerinoError:
            raise
        except Exception as error:  # they load libraries when they are imported, or at the first call
            reasons.append(f"{name}: {' '.join(str(error).split())}")
    raise UnsupportedError(
        f"CUDA's driver cannot be loaded ({'; '.join(reasons)})",
        "install NVIDIA's driver; in a container start it with --runtime nvidia; or use a backend for the CPU",
    )


def refusal(call: str, error: str) -> UnsupportedError:
    """What is raised where the driver's `call` gives `error`, such as CUDA_ERROR_OUT_OF_MEMORY."""
    hint = HINTS.get(error, "merino-edge doctor says what is missing; or use a backend for the CPU")
    return UnsupportedError(f"CUDA refuses: {call} gives {error}", hint)
