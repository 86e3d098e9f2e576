"""The CUDA calls of an engine: a stream on the first GPU, memory, copies, kernels and CUDA graphs.

They go through NVIDIA's package cuda-bindings, which has wheels for aarch64 and all Python versions. PyCUDA would be
compiled on the board. Like TensorRT it uses the device's primary context, so no context has to be made current. All
functions here raise UnsupportedError with CUDA's name for the error, and MissingExtraError without the package.
Knows no engine. Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from merino_edge.errors import MerinoError, MissingExtraError, UnsupportedError


def gpu_capability() -> str:
    """Compute capability of the first GPU, such as SM87. Raises UnsupportedError without a GPU, MissingExtraError."""
    cuda = Cuda()
    try:
        return cuda.capability
    finally:
        cuda.close()


@cache  # a sequence that outgrows its plan must not wait for the compiler again
def _binary(source: str, name: str, capability: str) -> bytes:
    """Compile the kernel `name` of CUDA C. Raises UnsupportedError where NVRTC is missing or refuses it."""
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")
        _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    except (ImportError, RuntimeError) as error:  # the bindings look for the library at the first call
        raise UnsupportedError(f"CUDA's compiler is missing ({error})", "install CUDA's toolkit") from None
    architecture = f"--gpu-architecture={capability.lower().replace('sm', 'sm_')}"
    status, *_ = nvrtc.nvrtcCompileProgram(program, 1, [architecture.encode()])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnsupportedError(f"CUDA's compiler refuses {name}: {status.name}", "update CUDA's toolkit")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    binary = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(binary)


class Cuda:
    """A CUDA stream and the memory allocated through it. Addresses are plain integers.

    Raises UnsupportedError where there is no GPU or a call fails, MissingExtraError without cuda-bindings.
    """

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
        """Compute capability of the first GPU, such as SM87."""
        kinds = self._runtime.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, 0)
        return f"SM{major}{minor}"

    @property
    def unified(self) -> bool:
        """Whether GPU and CPU share one memory, as on a Jetson: pinned memory then needs no copies."""
        return bool(self._call("cudaDeviceGetAttribute", self._runtime.cudaDeviceAttr.cudaDevAttrIntegrated, 0))

    def allocate(self, size_bytes: int) -> int:
        """Allocate `size_bytes` zero bytes on the GPU and return the address, aligned to 256 as TensorRT requires."""
        address = int(self._call("cudaMalloc", size_bytes))
        self._addresses.append(address)
        self._call("cudaMemsetAsync", address, 0, size_bytes, self.stream)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate an array of zeros in pinned host memory, which recorded copies need. It is valid until `close`."""
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(self._call("cudaHostAlloc", size_bytes, self._runtime.cudaHostAllocMapped))
        self._pinned.append(address)
        ctypes.memset(address, 0, size_bytes)
        memory = (ctypes.c_uint8 * size_bytes).from_address(address)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def address_of(self, pinned: NDArray[Any]) -> int:
        """The GPU's address of an array that `pinned` returned."""
        return int(self._call("cudaHostGetDevicePointer", pinned.ctypes.data, 0))

    def to_device(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy of `array` to the GPU. It must be contiguous, and must not change before `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def to_host(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy from the GPU into `array`. The data is there after `synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy_rows(
        self, source: int, target: int, width: int, rows: int, *, source_pitch: int, target_pitch: int
    ) -> None:
        """Queue a copy of `rows` rows of `width` bytes within the GPU. A pitch is the distance of two rows in bytes."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.stream)

    def compile(self, source: str, name: str) -> Any:
        """Compile the kernel `name` for this GPU. Raises UnsupportedError where NVRTC is missing or refuses it."""
        image = np.frombuffer(_binary(source, name, self.capability), np.uint8)
        driver = import_module("cuda.bindings.driver")
        module = self._call("cuModuleLoadData", image.ctypes.data, library=driver)
        return self._call("cuModuleGetFunction", module, name.encode(), library=driver)

    def start(
        self, kernel: Any, grid: tuple[int, int], threads: int, arguments: tuple[int, ...], pointers: int
    ) -> None:
        """Queue a kernel over `grid` blocks. The first `pointers` arguments are pointers, the others 32-bit ints."""
        types = (ctypes.c_void_p,) * pointers + (ctypes.c_int,) * (len(arguments) - pointers)
        driver = import_module("cuda.bindings.driver")
        blocks, block = (*grid, 1), (threads, 1, 1)
        self._call("cuLaunchKernel", kernel, *blocks, *block, 0, self.stream, (arguments, types), 0, library=driver)

    def recorded(self, work: Callable[[], None]) -> Any:
        """Record what `work` queues as a CUDA graph for `launch`. Returns None where it cannot be recorded."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._call("cudaStreamBeginCapture", self.stream, mode)
            try:
                work()
            finally:  # also after an error, the stream must leave the capture mode
                status, graph = runtime.cudaStreamEndCapture(self.stream)
            if int(status) != 0:
                raise UnsupportedError(f"CUDA refuses: cudaStreamEndCapture gives {status.name}", "run it unrecorded")
            executable = self._call("cudaGraphInstantiate", graph, 0)
            self._call("cudaGraphDestroy", graph)
        except MerinoError:
            runtime.cudaGetLastError()  # clears the error, which the next call would return otherwise
            return None
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Queue a recorded graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def synchronize(self) -> None:
        """Wait for all queued work."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free all memory, the graphs and the stream. May be called twice."""
        while self._graphs:
            self._call("cudaGraphExecDestroy", self._graphs.pop())
        while self._pinned:
            self._call("cudaFreeHost", self._pinned.pop())
        while self._addresses:
            self._call("cudaFree", self._addresses.pop())
        if self.stream:
            self._call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def _call(self, name: str, *arguments: Any, library: Any = None) -> Any:
        """Call a function of the CUDA runtime, or of `library` (the driver). Raises UnsupportedError if it fails."""
        status, *values = getattr(library or self._runtime, name)(*arguments)
        if int(status) != 0:
            errors, hint = self._runtime.cudaError_t, "use a backend for the CPU, or repair the driver"
            if status == errors.cudaErrorInsufficientDriver:
                hint = "use a backend for the CPU; with a GPU: pip install 'cuda-bindings==N.*' for the driver's CUDA N"
            if status == errors.cudaErrorMemoryAllocation:
                hint = "build the engine with less --context"
            raise UnsupportedError(f"CUDA refuses: {name} gives {status.name}", hint)
        return values[0] if values else None
