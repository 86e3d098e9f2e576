"""Stand-ins for CUDA and TensorRT on a machine without a GPU.

Addresses are those of host memory, and ONNX Runtime computes. As TensorRT does, it reads and writes only the bound
addresses and requires shapes within the profile.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest

from merino_edge.errors import UnsupportedError
from merino_edge.runtime.engines.onnx_engine import FIRST_WITH_TENSOR_SCATTER, installed_version

TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
PROFILES = (512, 2)  # the most tokens of each optimization profile
PROFILE_ROWS = (8, 1)  # the most rows of logits
COMPILER = shutil.which("c++") or shutil.which("g++")
HOST_CUDA = """
#include <string.h>
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads()
static unsigned __float_as_uint(float number) { unsigned bits; memcpy(&bits, &number, 4); return bits; }
static float __uint_as_float(unsigned bits) { float number; memcpy(&number, &bits, 4); return number; }
static struct { int x, y; } blockIdx, threadIdx, blockDim = {1, 1};
extern "C" void set_block(int x, int y) { blockIdx.x = x; blockIdx.y = y; }
"""


@cache
def compiled(source: str) -> ctypes.CDLL:
    """Compile a kernel's source for the host, with one thread per block, which our kernels allow."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cpp").write_text(HOST_CUDA + source)
        built = [COMPILER, "-shared", "-fPIC", "-O1", "-o", f"{folder}/kernel.so", f"{folder}/kernel.cpp"]
        subprocess.run(built, check=True)
        return ctypes.CDLL(f"{folder}/kernel.so")


class HostMemory:
    """Stands in for merino_edge.runtime.engines.cuda.Cuda."""

    stream = 7
    live: ClassVar[int] = 0  # allocations
    unified: ClassVar[bool] = False
    copies: ClassVar[int] = 0  # of tokens, positions and logits
    can_record: ClassVar[bool] = True
    can_compile: ClassVar[bool] = True
    started: ClassVar[int] = 0  # kernels
    recordings: ClassVar[int] = 0
    launches: ClassVar[int] = 0

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []

    def allocate(self, size_bytes: int) -> int:
        self.buffers.append(np.zeros(size_bytes, np.uint8))
        HostMemory.live += 1
        return int(self.buffers[-1].ctypes.data)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def address_of(self, pinned: np.ndarray) -> int:
        return int(pinned.ctypes.data)

    def compile(self, source: str, name: str) -> Any:
        if COMPILER is None or not self.can_compile:
            raise UnsupportedError("no compiler", "")
        return compiled(source), name

    def start(
        self, kernel: Any, grid: tuple[int, int], threads: int, arguments: tuple[int, ...], pointers: int
    ) -> None:
        """Runs the blocks one after the other."""
        HostMemory.started += 1
        library, name = kernel
        addresses = [ctypes.c_void_p(address) for address in arguments[:pointers]]
        for x, y in itertools.product(*map(range, grid)):
            library.set_block(x, y)
            library[name](*addresses, *arguments[pointers:])

    def recorded(self, work: Callable[[], None]) -> Callable[[], None] | None:
        HostMemory.recordings += 1
        return work if self.can_record else None

    def launch(self, graph: Callable[[], None]) -> None:
        HostMemory.launches += 1
        graph()

    def to_device(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        HostMemory.copies += 1
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(self, address: int, array: np.ndarray) -> None:
        HostMemory.copies += 1
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_rows(
        self, source: int, target: int, width: int, rows: int, *, source_pitch: int, target_pitch: int
    ) -> None:
        for row in range(rows):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        HostMemory.live -= len(self.buffers)
        self.buffers = []


class Context:
    def __init__(self, session: ort.InferenceSession) -> None:
        self.session, self.addresses, self.lengths, self.profile = session, {}, {}, -1

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.profile = index

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name == "logit_rows":
            assert len(shape) == 1 and 1 <= shape[0] <= PROFILE_ROWS[self.profile]
        else:
            assert len(shape) == 2 and shape[0] == 1 and 1 <= shape[1] <= PROFILES[self.profile]
        self.lengths[name] = shape[-1]

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {value.name: self.at_address(value).copy() for value in self.session.get_inputs()}
        results = self.session.run(None, feeds)
        for value, result in zip(self.session.get_outputs(), results, strict=True):
            self.at_address(value)[...] = result
        return stream == HostMemory.stream

    def at_address(self, value: Any) -> np.ndarray:
        lengths = {"T": self.lengths["tokens"], "N": self.lengths.get("logit_rows")}
        shape = [lengths[extent] if isinstance(extent, str) else extent for extent in value.shape]
        dtype = np.dtype(TYPES[value.type])
        memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[value.name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    num_optimization_profiles = len(PROFILES)

    def __init__(self, graph: bytes) -> None:
        if b"TensorScatter" in graph and installed_version() < FIRST_WITH_TENSOR_SCATTER:
            pytest.skip("this ONNX Runtime, in TensorRT's place, has no TensorScatter")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.tensors = {v.name: v for v in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(extent, str) else extent for extent in self.tensors[name].shape]

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.tensors[name].type)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(1,), (1,), (PROFILE_ROWS[index],)] if name == "logit_rows" else [(1, 1), (1, 1), (1, PROFILES[index])]

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "on profile change"
        return Context(self.session)


class OnnxInPlaceOfTensorRt:
    """Stands in for the library's module. A plan is the serialized graph."""

    __version__ = "0"

    class ExecutionContextAllocationStrategy:
        ON_PROFILE_CHANGE = "on profile change"

    class Runtime:
        def __init__(self, log: Any) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Engine:
            return Engine(plan)

    @staticmethod
    def nptype(dtype: str) -> type:
        return TYPES[dtype]
