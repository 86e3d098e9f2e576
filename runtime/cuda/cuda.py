"""The CUDA calls of an engine: a stream on the first GPU, memory, copies, kernels and CUDA graphs.

It knows no engine and no package: merino_edge.runtime.cuda.provider chooses who calls the driver. The device's context
must be current on the thread that calls: see `active`. All functions here raise UnsupportedError with CUDA's name for
the error, and MissingExtraError without a package. Not run on a GPU yet. Tested on a strict stand-in for the driver,
through both packages.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from merino_edge.errors import MerinoError, UnsupportedError
from merino_edge.runtime.cuda.compiler import compiled
from merino_edge.runtime.cuda.provider import Launch, Provider, Rows, open_provider


def gpu_capability() -> str:
    """Compute capability of the first GPU, such as SM87. Raises UnsupportedError without a GPU, MissingExtraError."""
    return capability_of(open_provider())


def capability_of(provider: Provider) -> str:
    """Compute capability of the provider's GPU, such as SM87."""
    return f"SM{provider.attribute('COMPUTE_CAPABILITY_MAJOR')}{provider.attribute('COMPUTE_CAPABILITY_MINOR')}"


class Cuda:
    """A CUDA stream and the memory allocated through it. Addresses are plain integers.

    All methods but `close` must be called within `active`, on any thread, by one thread at a time.
    """

    def __init__(self, provider: Provider | None = None) -> None:
        """Open the first GPU. Raises UnsupportedError where there is none or a call fails, MissingExtraError."""
        self._provider = provider or open_provider()
        self.provider = self._provider.name
        self._addresses: list[int] = []
        self._pinned: list[int] = []
        self._kernels: list[Any] = []
        self._graphs: list[Any] = []
        self.stream = 0
        self._provider.retain()
        self._open = True
        try:
            with self.active():
                self.stream = self._provider.new_stream()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU's context current on this thread for a while. It may be nested."""
        self._provider.push()
        try:
            yield
        finally:
            self._provider.pop()

    @property
    def capability(self) -> str:
        """Compute capability of the first GPU, such as SM87."""
        return capability_of(self._provider)

    @property
    def unified(self) -> bool:
        """Whether GPU and CPU share one memory, as on a Jetson: pinned memory then needs no copies."""
        return bool(self._provider.attribute("INTEGRATED"))

    def allocate(self, size_bytes: int) -> int:
        """Allocate `size_bytes` zero bytes on the GPU and return the address, aligned to 256 as TensorRT requires."""
        address = self._provider.allocate(size_bytes)
        self._addresses.append(address)
        self._provider.fill(address, 0, size_bytes, self.stream)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate an array of zeros in pinned host memory, which recorded copies need. It is valid until `close`."""
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        address = self._provider.pin(size_bytes)
        self._pinned.append(address)
        ctypes.memset(address, 0, size_bytes)
        memory = (ctypes.c_uint8 * size_bytes).from_address(address)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def address_of(self, pinned: NDArray[Any]) -> int:
        """The GPU's address of an array that `pinned` returned."""
        return self._provider.device_address(pinned.ctypes.data)

    def to_device(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy of `array` to the GPU. It must be contiguous, and must not change before `synchronize`."""
        self._provider.copy_to_device(address, array.ctypes.data, array.nbytes, self.stream)

    def to_host(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy from the GPU into `array`. The data is there after `synchronize`."""
        self._provider.copy_to_host(array.ctypes.data, address, array.nbytes, self.stream)

    def copy_rows(
        self, source: int, target: int, width: int, rows: int, *, source_pitch: int, target_pitch: int
    ) -> None:
        """Queue a copy of `rows` rows of `width` bytes within the GPU. A pitch is the distance of two rows in bytes."""
        self._provider.copy_rows(Rows(source, source_pitch), Rows(target, target_pitch), width, rows, self.stream)

    def compile(self, source: str, name: str) -> Any:
        """Compile the kernel `name` for this GPU. Raises UnsupportedError where the compiler is missing or refuses."""
        kernel = self._provider.load(compiled(source, name, self.capability), name)
        self._kernels.append(kernel)
        return kernel

    def start(
        self, kernel: Any, grid: tuple[int, int], threads: int, arguments: tuple[int, ...], pointers: int
    ) -> None:
        """Queue a kernel over `grid` blocks. The first `pointers` arguments are pointers, the others 32-bit ints."""
        self._provider.start(kernel, Launch(grid, threads, arguments, pointers), self.stream)

    def recorded(self, work: Callable[[], None]) -> Any:
        """Record what `work` queues as a CUDA graph for `launch`. Returns None where it cannot be recorded."""
        provider = self._provider
        try:
            provider.begin_capture(self.stream)
            try:
                work()
            except BaseException:  # the stream must leave the capture mode in any case
                with suppress(UnsupportedError):
                    provider.destroy_graph(provider.end_capture(self.stream))
                raise
            graph = provider.end_capture(self.stream)
        except MerinoError:
            return None
        self._graphs.append(graph)
        return graph

    def launch(self, graph: Any) -> None:
        """Queue a recorded graph."""
        self._provider.launch(graph, self.stream)

    def synchronize(self) -> None:
        """Wait for all queued work."""
        self._provider.synchronize(self.stream)

    def close(self) -> None:
        """Free all memory, the graphs and the stream. May be called twice, on any thread.

        An error here is one of earlier work, which has been raised there. So nothing is raised.
        """
        if not self._open:
            return
        self._open = False
        for _ in range(2):  # once more where the context could not be made current
            with suppress(UnsupportedError), self.active():
                self._free()
                break
        with suppress(UnsupportedError):
            self._provider.release()

    def _free(self) -> None:
        """Free all memory, the graphs and the stream, as far as the driver lets it."""
        provider = self._provider
        if self.stream:  # queued work may still use what is freed
            with suppress(UnsupportedError):
                provider.synchronize(self.stream)
        for free, held in (
            (provider.destroy_graph, self._graphs),
            (provider.unload, self._kernels),
            (provider.unpin, self._pinned),
            (provider.free, self._addresses),
        ):
            while held:
                with suppress(UnsupportedError):
                    free(held.pop())
        if self.stream:
            stream, self.stream = self.stream, 0
            with suppress(UnsupportedError):
                provider.destroy_stream(stream)
