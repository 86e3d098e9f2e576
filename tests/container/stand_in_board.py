"""A command of merino-edge on a stand-in for a board: the strict driver, and ONNX Runtime in TensorRT's place.

    python tests/container/stand_in_board.py build BUNDLE
    python tests/container/stand_in_board.py generate BUNDLE --prompt TEXT --greedy
    python tests/container/stand_in_board.py profile --space demo --backend tensorrt --dry-run --out TABLE

An engine is then the graph with its weights. It goes into the engine store and comes from there, and every step passes
through the driver's calls. NVRTC compiles the kernels where it is there; they run as host code of the same source.
The variable TENSORRT names the release that the stand-in is, so a profile takes that release's lowering.
Runs where a C++ compiler, cuda-bindings and pytest are, as in arm64_image.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.fake_driver import load_driver
from helpers.stand_in_gpu import PROFILES, OnnxInPlaceOfTensorRt
from merino_edge import tensorrt_library
from merino_edge.cli.main import main
from merino_edge.export.tensorrt import Engine
from merino_edge.jetson import engine_build
from merino_edge.jetson.doctor import features
from merino_edge.jetson.profiler import compiled_models
from merino_edge.runtime.engines import kv_scatter_kernel, topk_kernel


def in_place_of_the_compiler(
    library: str, graph: Path | bytes, context: int, capability: str = "", **more: Any
) -> Engine:
    """An engine that is the graph, with its weights in it."""
    began = time.perf_counter()
    plan = graph if isinstance(graph, bytes) else onnx.load(graph).SerializeToString()
    OnnxInPlaceOfTensorRt.Runtime(None).deserialize_cuda_engine(plan)  # as a compiler, it refuses what it cannot run
    profiles = [(1, 1, min(most, context)) for most in sorted(PROFILES)]
    version = OnnxInPlaceOfTensorRt.__version__
    seconds = time.perf_counter() - began
    return Engine(
        plan, library, version, capability, seconds, Counter(), profiles, b"", weight_bytes=len(plan), widening_bytes=0
    )


def run() -> None:
    driver = load_driver()
    if driver is None:
        raise SystemExit("the stand-in for the driver cannot be loaded here")
    driver.set(major=8, minor=7, integrated=1)  # an Orin
    for source, name in (*((k.SOURCE, k.NAME) for k in (kv_scatter_kernel, topk_kernel)), features.SMALLEST_KERNEL):
        driver.add_kernel(source, name)
    ort.set_default_logger_severity(3)  # TensorScatter warns at each step that it copies
    OnnxInPlaceOfTensorRt.__version__ = os.environ.get("TENSORRT", "10.3")
    stand_in = (OnnxInPlaceOfTensorRt, SimpleNamespace(first="", forget=lambda: None))
    load, full = tensorrt_library.load, tensorrt_library.TENSORRT
    tensorrt_library.load = lambda library: stand_in if library == full else load(library)  # type: ignore[assignment]
    tensorrt_library.installed = lambda: full
    for module in (engine_build, compiled_models):
        module.build_engine = in_place_of_the_compiler  # type: ignore[attr-defined]
    features._probed_apart = lambda: dict(features.probe())  # a process of its own would not have the stand-ins
    calls = driver.calls
    try:
        main()
    finally:
        steps = driver.count("cuLaunchKernel", "cuGraphLaunch", "cuStreamSynchronize")
        sys.stderr.write(f"stand-in driver: {driver.calls - calls} calls, {steps} launches and waits\n")


if __name__ == "__main__":
    run()
