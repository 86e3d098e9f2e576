"""The provider on PyCUDA: its objects for memory, streams and kernels, and the driver itself for CUDA graphs.

PyCUDA has no graphs, so six functions of the driver's library are called on its stream's handle. It keeps a stack of
contexts for each thread, and ends the process where a thread leaves one behind. So `push` and `pop` go through it. It
gives a context back only on the thread that took it. So the process keeps one until its end.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pycuda.driver as driver

from merino_edge.runtime.cuda.provider import Launch, Rows, refusal

NON_BLOCKING, THREAD_LOCAL = 1, 1  # a flag of streams, a mode of captures
MOST_CODES = 1000


@cache
def library() -> ctypes.CDLL:
    """The driver's library, which PyCUDA has loaded."""
    return ctypes.CDLL("libcuda.so.1")


def error_name(code: int) -> str:
    """The driver's name of an error, such as CUDA_ERROR_OUT_OF_MEMORY."""
    name = ctypes.c_char_p()
    known = library().cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value
    return name.value.decode() if known and name.value else f"error {code}"


@cache
def names_by_text() -> dict[str, str]:
    """PyCUDA's errors carry the driver's sentence about an error, not its name."""
    found, text = {}, ctypes.c_char_p()
    for code in range(1, MOST_CODES):
        if library().cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value:
            found[text.value.decode()] = error_name(code)
    return found


@contextmanager
def refusing() -> Iterator[None]:
    """Turn PyCUDA's errors, "FUNCTION failed: TEXT", into UnsupportedError."""
    try:
        yield
    except driver.Error as error:
        call, _, text = str(error).partition(" failed: ")
        raise refusal(call, names_by_text().get(text.split(" - ")[0], text or "an error")) from None


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver that PyCUDA lacks. Raises UnsupportedError if it fails."""
    if status := getattr(library(), name)(*arguments):
        raise refusal(name.split("_")[0], error_name(status))


@cache
def primary_context() -> Any:
    """The device's primary context, kept until the process ends."""
    context = driver.Device(0).retain_primary_context()
    atexit.register(context.detach)
    return context


class Kernel:
    """A kernel with its module, which PyCUDA unloads with the last reference to the function."""

    def __init__(self, function: Any) -> None:
        self.function = function


def open_device() -> PyCudaProvider:
    """Start the driver and take the first GPU. Raises UnsupportedError."""
    with refusing():
        driver.init()
        return PyCudaProvider(driver.Device(0))


class PyCudaProvider:
    """Implements merino_edge.runtime.cuda.provider.Provider."""

    name = "PyCUDA"

    def __init__(self, device: Any) -> None:
        self._device = device
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}  # PyCUDA's objects by address
        self._pinned: dict[int, Any] = {}

    def attribute(self, name: str) -> int:
        with refusing():
            return int(self._device.get_attribute(getattr(driver.device_attribute, name)))

    def retain(self) -> None:
        with refusing():
            primary_context()

    def release(self) -> None:
        """The context stays until the process ends."""

    def push(self) -> None:
        with refusing():
            primary_context().push()

    def pop(self) -> None:
        with refusing():
            driver.Context.pop()

    def memory_bytes(self) -> tuple[int, int]:
        with refusing():
            free, total = driver.mem_get_info()
        return int(free), int(total)

    def new_stream(self) -> int:
        with refusing():
            stream = driver.Stream(NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        with refusing():
            self._streams[stream].synchronize()

    def allocate(self, size: int) -> int:
        with refusing():
            memory = driver.mem_alloc(size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        with refusing():
            self._memory.pop(address).free()

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        with refusing():
            driver.memset_d8_async(address, value, size, self._streams[stream])

    def pin(self, size: int) -> int:
        with refusing():
            array = driver.pagelocked_empty(size, np.uint8, mem_flags=driver.host_alloc_flags.DEVICEMAP)
        self._pinned[array.ctypes.data] = array.base
        return int(array.ctypes.data)

    def unpin(self, host: int) -> None:
        with refusing():
            self._pinned.pop(host).free()

    def device_address(self, host: int) -> int:
        with refusing():
            return int(self._pinned[host].get_device_pointer())

    def copy_to_device(self, address: int, host: int, size: int, stream: int) -> None:
        with refusing():
            driver.memcpy_htod_async(address, (ctypes.c_uint8 * size).from_address(host), self._streams[stream])

    def copy_to_host(self, host: int, address: int, size: int, stream: int) -> None:
        with refusing():
            driver.memcpy_dtoh_async((ctypes.c_uint8 * size).from_address(host), address, self._streams[stream])

    def copy_rows(self, source: Rows, target: Rows, width: int, count: int, stream: int) -> None:
        copy = driver.Memcpy2D()
        copy.set_src_device(source.address)
        copy.set_dst_device(target.address)
        copy.src_pitch, copy.dst_pitch, copy.width_in_bytes, copy.height = source.pitch, target.pitch, width, count
        with refusing():
            copy(self._streams[stream])

    def load(self, binary: bytes, name: str) -> Kernel:
        with refusing():
            return Kernel(driver.module_from_buffer(binary).get_function(name))

    def unload(self, kernel: Kernel) -> None:
        kernel.function = None

    def start(self, kernel: Kernel, launch: Launch, stream: int) -> None:
        kinds = "P" * launch.pointers + "i" * (len(launch.arguments) - launch.pointers)
        with refusing():
            kernel.function.prepare(kinds)
            kernel.function.prepared_async_call(
                launch.grid, (launch.threads, 1, 1), self._streams[stream], *launch.arguments
            )

    def begin_capture(self, stream: int) -> None:
        call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), THREAD_LOCAL)

    def end_capture(self, stream: int) -> Any:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            library().cuGraphDestroy(graph)
        return executable

    def launch(self, graph: Any, stream: int) -> None:
        call("cuGraphLaunch", graph, ctypes.c_void_p(stream))

    def destroy_graph(self, graph: Any) -> None:
        call("cuGraphExecDestroy", graph)
