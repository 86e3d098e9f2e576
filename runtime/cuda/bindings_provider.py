"""The provider on cuda-bindings: each method is one or two functions of `cuda.bindings.driver`."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda.bindings import driver

from merino_edge.runtime.cuda.provider import Launch, Rows, refusal

NON_BLOCKING, MAPPED = 1, 2  # flags of streams and of pinned memory


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver and return its result. Raises UnsupportedError if it fails."""
    status, *values = getattr(driver, name)(*arguments)
    if int(status) != 0:
        raise refusal(name, status.name)
    return values[0] if len(values) == 1 else tuple(values)


def open_device() -> BindingsProvider:
    """Start the driver and take the first GPU. Raises UnsupportedError."""
    call("cuInit", 0)
    return BindingsProvider()


class BindingsProvider:
    """Implements merino_edge.runtime.cuda.provider.Provider."""

    name = "cuda-bindings"

    def __init__(self) -> None:
        self._device = call("cuDeviceGet", 0)
        self._context: Any = None

    def attribute(self, name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call("cuDeviceGetAttribute", kind, self._device))

    def retain(self) -> None:
        self._context = call("cuDevicePrimaryCtxRetain", self._device)

    def release(self) -> None:
        call("cuDevicePrimaryCtxRelease", self._device)

    def memory_bytes(self) -> tuple[int, int]:
        free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def push(self) -> None:
        call("cuCtxPushCurrent", self._context)

    def pop(self) -> None:
        call("cuCtxPopCurrent")

    def new_stream(self) -> int:
        return int(call("cuStreamCreate", NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        call("cuStreamSynchronize", stream)

    def allocate(self, size: int) -> int:
        return int(call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        call("cuMemFree", address)

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        call("cuMemsetD8Async", address, value, size, stream)

    def pin(self, size: int) -> int:
        return int(call("cuMemHostAlloc", size, MAPPED))

    def unpin(self, host: int) -> None:
        call("cuMemFreeHost", host)

    def device_address(self, host: int) -> int:
        return int(call("cuMemHostGetDevicePointer", host, 0))

    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None:
        call("cuMemcpyHtoDAsync", address, host, size, stream)

    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None:
        call("cuMemcpyDtoHAsync", host, address, size, stream)

    def copy_rows(self, source: Rows, target: Rows, width: int, count: int, stream: int) -> None:
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.dstDevice = source.address, target.address
        copy.srcPitch, copy.dstPitch, copy.WidthInBytes, copy.Height = source.pitch, target.pitch, width, count
        call("cuMemcpy2DAsync", copy, stream)

    def load(self, binary: bytes, name: str) -> Any:
        module = call("cuModuleLoadData", np.frombuffer(binary, np.uint8).ctypes.data)
        try:
            return module, call("cuModuleGetFunction", module, name.encode())
        except BaseException:
            call("cuModuleUnload", module)
            raise

    def unload(self, kernel: Any) -> None:
        call("cuModuleUnload", kernel[0])

    def start(self, kernel: Any, launch: Launch, stream: int) -> None:
        integers = len(launch.arguments) - launch.pointers
        types = (ctypes.c_void_p,) * launch.pointers + (ctypes.c_int,) * integers
        parameters = (launch.arguments, types)
        call("cuLaunchKernel", kernel[1], *launch.grid, 1, launch.threads, 1, 1, 0, stream, parameters, 0)

    def begin_capture(self, stream: int) -> None:
        call("cuStreamBeginCapture", stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> Any:
        graph = call("cuStreamEndCapture", stream)
        try:
            return call("cuGraphInstantiate", graph, 0)
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self, graph: Any, stream: int) -> None:
        call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        call("cuGraphExecDestroy", graph)
