"""Backends: each opens the engine that runs an architecture on a kind of device, with random weights.

| backend | runs | attention of a step reads |
|---|---|---|
| onnxruntime-cpu | the graph exported for `onnxruntime` (fp16 is how it is stored) | the positions in use |
| onnxruntime-cuda | the graph exported for `onnxruntime-cuda` | the positions in use |
| tensorrt, tensorrt-rtx | the graph for TensorRT, compiled for this GPU | the whole context's cache |
| torch-cpu, -cuda | the module of `merino_edge.pytorch.model`, eager | the positions in use |

Random weights do not change how long a step takes. Measured with 3 layers of 768 under ONNX Runtime: 5.39 ms a token,
5.41 with a checkpoint's quantised weights; int4 1.119 and 1.120. A library is imported when an engine is opened, not
before. No backend for a GPU was run on one yet. This module knows no clock (`merino_edge.jetson.profiler.timer`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

import numpy as np

from merino_edge import names
from merino_edge.architecture import Architecture, Block
from merino_edge.counts import PRECISIONS
from merino_edge.errors import MerinoError, UnsupportedError, require
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.runtime.engine import Engine

if TYPE_CHECKING:
    from merino_edge.jetson.profiler.compiled_models import CompiledModels

TINY = Architecture(2, 16, 64, 64, (Block(64, 1, 1, 1, 64),))


class TimedEngine(Engine, Protocol):
    """An engine that can be timed at any length."""

    def mark_filled(self, positions: int) -> None:
        """Treat so many cache positions as written, whatever they hold."""
        ...


@dataclass(frozen=True)
class Backend:
    """One way to run a model on one kind of device."""

    name: str
    device: str  # cpu, cuda
    libraries: tuple[str, ...]  # distributions that decide how fast it is
    precisions: tuple[str, ...]
    open: Callable[[Architecture, str, int], TimedEngine] = field(repr=False)
    cache_capacity: Callable[[int, int], int] = field(
        repr=False
    )  # of the cache that a step reads: (positions in use, context)
    lowering: str = ""  # of the graphs; "" where it runs none, or where `models` chooses it
    models: Callable[[], CompiledModels] | None = field(default=None, repr=False)  # that it compiles
    driver_package: Callable[[], str] | None = field(default=None, repr=False)  # the one that calls CUDA's driver here
    _placement: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # of the newest engine

    def engine(self, a: Architecture, precision: str, threads: int) -> TimedEngine:
        """The engine of `a` with random weights. Its `forward` returns when the logits are on the host.

        Raises UnsupportedError where the backend cannot run the precision, the shape or on this machine. Raises
        MissingExtraError where a package is missing.
        """
        if precision not in self.precisions:
            raise UnsupportedError(
                f"{self.name} cannot time {precision}", f"choose --precision {' or '.join(self.precisions)}"
            )
        engine = self.open(a, precision, threads)
        warning = getattr(engine, "placement_warning", "")
        self._placement[:] = [warning] if warning else []
        return engine

    def lowering_at(self, precision: str) -> str:
        """The lowering of the graphs at `precision`. Raises what `models` raises."""
        return self.models().lowering(precision) if self.models else self.lowering

    @property
    def warnings(self) -> list[str]:
        """What went wrong without ending the profile, a line each."""
        return [*(self.models().warnings if self.models else []), *self._placement]

    def check(self, precision: str) -> None:
        """Run one token through a tiny model. Raises what `engine` raises, before anything is measured."""
        with contextlib.closing(self.engine(TINY, precision, 1)) as engine:
            engine.forward(np.zeros(1, np.int64), 0)

    def versions(self) -> dict[str, str]:
        """The versions of the libraries; "unknown" where one is no Python distribution here.

        The package that calls CUDA's driver is the one that is used here. Without a GPU it is none.
        """
        names = list(self.libraries)
        if self.driver_package is not None:
            with contextlib.suppress(MerinoError):
                names.append(self.driver_package())
        return {name: _version(name) for name in names}


def backend_named(name: str) -> Backend:
    """The backend called `name`. Raises UnsupportedError where there is none."""
    if name not in BACKENDS:
        raise UnsupportedError(f"unknown backend {name!r}", names.choose(name, BACKENDS))
    return BACKENDS[name]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


# --- each kind -------------------------------------------------------------------------------------


def _onnxruntime(device: str) -> Backend:
    def open_engine(a: Architecture, precision: str, threads: int) -> TimedEngine:
        from merino_edge.jetson.profiler.random_graph import random_graph
        from merino_edge.runtime.engines.onnx_engine import OnnxEngine

        return OnnxEngine(random_graph(a, precision, target, "ort"), a, a.max_positions, threads, device=device)

    on_cpu = device == "cpu"
    target, library = ("onnxruntime", "onnxruntime") if on_cpu else (ONNX_CUDA_TARGET, "onnxruntime-gpu")
    precisions = PRECISIONS if on_cpu else tuple(p for p in PRECISIONS if p != "fp32")  # its attention has no float32
    libraries = ("numpy", library, "onnx-ir")
    return Backend(f"onnxruntime-{device}", device, libraries, precisions, open_engine, _in_use, "ort")


def _in_use(positions: int, context: int) -> int:
    return positions


def _tensorrt(name: str, distribution: str, module: str) -> Backend:
    @cache  # one for the process: its timings and the lowering that it chose
    def models() -> CompiledModels:
        from merino_edge import tensorrt_library
        from merino_edge.jetson.profiler.compiled_models import CompiledModels
        from merino_edge.runtime.cuda.cuda import gpu_capability

        tensorrt_library.load(module)
        return CompiledModels(module, gpu_capability())  # raises where there is no GPU, before the long compilation

    def open_engine(a: Architecture, precision: str, threads: int) -> TimedEngine:
        from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

        return TensorRtEngine(module, {a.max_positions: models().plan(a, precision)}, a)

    def driver_package() -> str:
        from merino_edge.runtime.cuda.provider import open_provider

        return open_provider().name

    return Backend(
        name,
        "cuda",
        ("numpy", distribution, "onnx-ir"),
        PRECISIONS,
        open_engine,
        lambda positions, context: context,
        models=models,
        driver_package=driver_package,
    )


def _torch(device: str) -> Backend:
    def open_engine(a: Architecture, precision: str, threads: int) -> TimedEngine:
        require("torch", "train")
        from merino_edge.pytorch.engine import TorchEngine
        from merino_edge.pytorch.model import Model

        return TorchEngine(Model(a), precision, threads, device)

    # No weight-only int8 or int4: PyTorch itself has no kernel that every device runs.
    libraries, precisions = ("numpy", "torch"), ("fp32", "fp16")
    return Backend(f"torch-{device}", device, libraries, precisions, open_engine, _in_use)


BACKENDS = {
    backend.name: backend
    for backend in (
        _onnxruntime("cpu"),
        _onnxruntime("cuda"),
        _tensorrt("tensorrt", "tensorrt", "tensorrt"),
        _tensorrt("tensorrt-rtx", "tensorrt-rtx-cu12-bindings", "tensorrt_rtx_bindings"),
        _torch("cpu"),
        _torch("cuda"),
    )
}
