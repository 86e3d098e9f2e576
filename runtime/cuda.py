"""The few calls of CUDA that an engine makes: one stream on the first GPU, memory there and here, copies, and graphs.

Through cuda-bindings, not PyCUDA: NVIDIA's own, with wheels for aarch64 and every Python, where PyCUDA is compiled on
the board; and it uses the device's primary context as TensorRT does, so there is none to make current. Every call may
fail, and does so as UnsupportedError with CUDA's own name for the reason. Knows no engine. Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from merino_edge.errors import MerinoError, MissingExtraError, UnsupportedError


def capability_here() -> str:
    """The first GPU's. Raises as the module says."""
    cuda = Cuda()
    try:
        return cuda.capability
    finally:
        cuda.close()


class Cuda:
    """A stream of its own, and what was allocated; addresses are plain numbers. Raises as the module says."""

    def __init__(self) -> None:
        try:
            runtime = import_module("cuda.bindings.runtime")
        except ImportError:
            raise MissingExtraError(
                "this needs the package cuda-bindings, which is not installed",
                "run: pip install 'merino-edge[jetson]'",
            ) from None
        self._runtime = runtime
        self._addresses: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        if self._call("cudaGetDeviceCount") == 0:
            raise UnsupportedError("CUDA finds no GPU (cudaGetDeviceCount is 0)", "use a backend for the CPU")
        self.stream = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))

    @property
    def capability(self) -> str:
        """The first GPU's, as in SM87."""
        kinds = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, 0)
        return f"SM{major}{minor}"

    def allocate(self, size_bytes: int) -> int:
        """The address of so many zero bytes, aligned to 256 as TensorRT asks for."""
        address = int(self._call("cudaMalloc", size_bytes))
        self._addresses.append(address)
        self._call("cudaMemsetAsync", address, 0, size_bytes, self.stream)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Zeros in memory of the host that the GPU copies from and to by itself, as recorded copies must; until `close`."""
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(self._call("cudaHostAlloc", size_bytes, self._runtime.cudaHostAllocDefault))
        self._pinned.append(address)
        ctypes.memset(address, 0, size_bytes)
        memory = (ctypes.c_uint8 * size_bytes).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def to_device(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy of `array`, which must be contiguous and stay until `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def to_host(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy into `array`, which holds it after `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        """Queue a copy of `rows` runs of `width` bytes, so many bytes apart there and here, within the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.stream)

    def recorded(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` queues, for `launch`; None where something in it cannot be recorded. Runs nothing."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        failed = False
        try:
            work()
        except MerinoError:
            failed = True
        finally:  # whatever happened, the stream must not stay in this mode
            status, graph = runtime.cudaStreamEndCapture(self.stream)
        if failed or status != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # forget it: the next call would give it otherwise
            return None
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Queue what was recorded."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free all of it. May be called twice."""
        while self._graphs:
            self._call("cudaGraphExecDestroy", self._graphs.pop())
        while self._pinned:
            self._call("cudaFreeHost", self._pinned.pop())
        while self._addresses:
            self._call("cudaFree", self._addresses.pop())
        if self.stream:
            self._call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            hint = "use a backend for the CPU, or repair the driver"
            if status == self._runtime.cudaError_t.cudaErrorInsufficientDriver:
                hint = "use a backend for the CPU; with a GPU: pip install 'cuda-bindings==N.*' for the driver's CUDA N"
            if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
                hint = "build the engine with less --context"
            raise UnsupportedError(f"CUDA refuses: {name} gives {status.name}", hint)
        return values[0] if values else None
