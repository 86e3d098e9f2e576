"""TensorRT's stand-in on a machine without a GPU: ONNX Runtime computes, on the strict stand-in for the driver.

As TensorRT does, it queues its work on the stream. It reads and writes only the bound addresses, when the stream gets
there. Shapes must be within the profile.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from helpers.fake_driver import COMPILER, FakeDriver, load_driver
from merino_edge import tensorrt_library
from merino_edge.errors import UnsupportedError
from merino_edge.runtime.cuda import cuda
from merino_edge.runtime.engines import kv_scatter_kernel, topk_kernel
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_TENSOR_SCATTER, installed_version

__all__ = ["COMPILER", "PROFILES", "PROFILE_ROWS", "Context", "OnnxInPlaceOfTensorRt", "gpu", "no_compiler"]
TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
PROFILES = (512, 2)  # the most tokens of each optimization profile
PROFILE_ROWS = (8, 1)  # the most rows of logits
ILLEGAL_ADDRESS, LAUNCH_FAILED = 700, 719
HOST_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)


@pytest.fixture
def gpu(fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A GPU: the strict driver, our kernels as host code, and ONNX Runtime in place of TensorRT."""
    for kernel in (kv_scatter_kernel, topk_kernel):
        fake_driver.add_kernel(kernel.SOURCE, kernel.NAME)
    stand_in = (OnnxInPlaceOfTensorRt, tensorrt_library.new_log(OnnxInPlaceOfTensorRt))
    monkeypatch.setattr(tensorrt_library, "load", lambda library: stand_in)
    return fake_driver


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CUDA's compiler be missing."""

    def missing(source: str, name: str, capability: str) -> bytes:
        raise UnsupportedError("CUDA's compiler is missing", "install it")

    monkeypatch.setattr(cuda, "compiled", missing)


class Context:
    can_record = True

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session, self.addresses, self.lengths, self.profile = session, {}, {}, -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name == "logit_rows":
            assert len(shape) == 1 and 1 <= shape[0] <= PROFILE_ROWS[self.profile]
        else:
            assert len(shape) == 2 and shape[0] == 1 and 1 <= shape[1] <= PROFILES[self.profile]
        self.lengths[name] = shape[-1]
        return True

    def execute_async_v3(self, stream: int) -> bool:
        driver = load_driver()
        assert driver is not None
        if not self.can_record and driver.is_capturing(stream):
            driver.library.cuStreamSynchronize(ctypes.c_void_p(stream))  # which ends the capture
        lengths = {"T": self.lengths["tokens"], "N": self.lengths.get("logit_rows", 1)}
        work = HOST_FUNCTION(partial(self.run, driver, dict(self.addresses), lengths))
        return driver.queue(stream, work) == 0

    def run(self, driver: FakeDriver, addresses: dict[str, int], lengths: dict[str, int], number: int) -> int:
        """What runs when the stream gets there; an error of the driver."""
        views = {}
        for value in (*self.session.get_inputs(), *self.session.get_outputs()):
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in value.shape]
            dtype, address = np.dtype(TYPES[value.type]), addresses[value.name]
            size = int(np.prod(shape)) * dtype.itemsize
            if not driver.is_device(address, size):
                return ILLEGAL_ADDRESS
            memory = (ctypes.c_uint8 * size).from_address(address)
            views[value.name] = np.frombuffer(memory, dtype).reshape(shape)
        feeds = {value.name: views[value.name].copy() for value in self.session.get_inputs()}
        try:
            results = self.session.run(None, feeds)
        except Exception:  # a token that the vocabulary lacks, as an engine that waits too little gives it
            return LAUNCH_FAILED
        for value, result in zip(self.session.get_outputs(), results, strict=True):
            views[value.name][...] = result
        return 0


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

    class ILogger:
        class Severity(IntEnum):
            INTERNAL_ERROR, ERROR, WARNING = range(3)

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
