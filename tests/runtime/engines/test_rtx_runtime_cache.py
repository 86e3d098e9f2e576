"""The runtime cache of TensorRT for RTX is one for a process, and is kept between starts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from helpers.fake_driver import FakeDriver
from helpers.stand_in_gpu import Context, Engine, OnnxInPlaceOfTensorRt
from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture, Block
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.rtx_runtime_cache import RtxRuntimeCache, process_cache
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.tensorrt_library import RTX
from merino_edge.weights import random_weights

MARK = b"runtime cache:"


class RuntimeCache:
    """As NVIDIA's: it takes only what one of its kind wrote. A context compiles when it is made, and when it runs."""

    made: ClassVar[int] = 0
    serialized: ClassVar[int] = 0

    def __init__(self) -> None:
        RuntimeCache.made += 1
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(MARK):
            self.kernels = blob.removeprefix(MARK)
        return blob.startswith(MARK)

    def serialize(self) -> bytes:
        RuntimeCache.serialized += 1
        return MARK + self.kernels


class RuntimeConfig:
    cuda_graph_strategy = ""

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class RtxContext(Context):
    cache: RuntimeCache

    def execute_async_v3(self, stream: int) -> bool:
        if b"run;" not in self.cache.kernels:
            self.cache.kernels += b"run;"
        return super().execute_async_v3(stream)


class RtxEngine(Engine):
    compiled: ClassVar[int] = 0

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: Any) -> Context:
        kernel = b"%d;" % self.num_io_tensors + config.cuda_graph_strategy.encode()
        if kernel not in config.cache.kernels:
            RtxEngine.compiled += 1
            config.cache.kernels += kernel
        assert config.strategy == "on profile change"
        context = RtxContext(self.session)
        context.cache = config.cache
        return context


class RtxInPlace(OnnxInPlaceOfTensorRt):
    __version__ = "1.7"

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE, DISABLED = "whole", "off"

    class Runtime(OnnxInPlaceOfTensorRt.Runtime):
        def deserialize_cuda_engine(self, plan: bytes) -> RtxEngine:
            return RtxEngine(plan)


def new_log() -> Any:
    log = tensorrt_library.new_log(RtxInPlace)
    log.log(RtxInPlace.ILogger.Severity.ERROR, "refused")
    return log


def test_the_cache_is_read_once_and_written_when_it_changed(tmp_path: Path) -> None:
    path, log = tmp_path / "cache.bin", new_log()
    first = RtxRuntimeCache(path)
    first.save()
    assert not path.exists()
    config, other = RuntimeConfig(), RuntimeConfig()
    first.attach(config, log)
    first.attach(other, log)
    assert config.cache is other.cache
    config.cache.kernels = b"a kernel"
    first.save()
    assert path.read_bytes() == MARK + b"a kernel" and log.first == "refused"
    path.write_bytes(b"damaged")
    first.save()  # nothing new
    assert path.read_bytes() == b"damaged"
    again = RtxRuntimeCache(path)
    again.attach(config, log)
    assert (
        config.cache.kernels == b"" and log.first == tensorrt_library.NO_REASON
    )  # a damaged file is an empty cache, and no reason of anything
    config.cache.kernels = b"another"
    again.save()
    assert path.read_bytes() == MARK + b"another" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("no folder")
    mine, config = RtxRuntimeCache(tmp_path / "engines" / "cache.bin"), RuntimeConfig()
    mine.attach(config, new_log())
    mine.save()


@pytest.fixture
def opened(gpu: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], TensorRtEngine]:
    """Opens an engine of two capacities, as in a new process. The engine store is `tmp_path`."""
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path))
    monkeypatch.setattr(tensorrt_library, "load", lambda library: (RtxInPlace, new_log()))
    a = Architecture(60, 32, 64, 64, (Block(64, 1, 1, 1, 64),))
    target = Target.named("rtx", "fp16", "primitive")
    stored = store(a, random_weights(a), target)
    plans: dict[int, bytes | Path] = {n: to_bytes(build_stored(a, stored, target, 32, n)) for n in (8, 32)}

    def start() -> TensorRtEngine:
        process_cache.cache_clear()
        RuntimeCache.made = RuntimeCache.serialized = RtxEngine.compiled = 0
        return TensorRtEngine(RTX, plans, a)

    return start


def test_engines_and_starts_share_one_cache(opened: Callable[[], TensorRtEngine], tmp_path: Path) -> None:
    for start in (0, 1):
        with contextlib.closing(opened()) as engine:
            engine.forward(np.arange(6), 0)
            engine.forward(np.arange(20), 6)  # outgrows the first plan
        assert RuntimeCache.made == 1 and RtxEngine.compiled == (2 if start == 0 else 0)
        (file,) = tmp_path.iterdir()
        assert re.fullmatch(r"rtx-runtime-1\.7-SM\d+\.bin", file.name)


def test_a_process_that_is_killed_leaves_the_kernels_it_compiled(
    opened: Callable[[], TensorRtEngine], tmp_path: Path
) -> None:
    with contextlib.closing(opened()) as engine:
        (file,) = tmp_path.iterdir()
        assert file.read_bytes() == MARK + b"8;whole8;off"  # as it was opened
        engine.forward(np.arange(6), 0)
        saved, inode = file.read_bytes(), file.stat().st_ino
        assert b"run;" in saved
        for _ in range(40):
            engine.forward(np.arange(1), 6)
        assert RuntimeCache.serialized == 3  # when it was opened, after 1 step and after 16
        assert file.stat().st_ino == inode  # nothing new, so nothing was written
    assert file.read_bytes() == saved
    with contextlib.closing(opened()) as engine:
        engine.forward(np.arange(6), 0)
    assert file.stat().st_ino == inode
