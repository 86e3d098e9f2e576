"""A command of merino-edge on a stand-in for a board: the strict driver, and ONNX Runtime in TensorRT's place.

    python tests/container/stand_in_board.py build BUNDLE
    python tests/container/stand_in_board.py generate BUNDLE --prompt TEXT --greedy

An engine is then the graph with its weights. It goes into the engine store and comes from there, and every step passes
through the driver's calls. Runs where a C++ compiler, cuda-bindings and pytest are, as in arm64_image.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.fake_driver import load_driver
from helpers.stand_in_gpu import PROFILES, OnnxInPlaceOfTensorRt
from merino_edge import tensorrt_library
from merino_edge.cli.main import main
from merino_edge.export.tensorrt import Engine
from merino_edge.jetson import engine_build


def in_place_of_the_compiler(library: str, graph: Path, context: int, capability: str = "", **more: Any) -> Engine:
    """An engine that is the graph, with its weights in it."""
    plan = onnx.load(graph).SerializeToString()
    profiles = [(1, 1, min(most, context)) for most in sorted(PROFILES)]
    version = OnnxInPlaceOfTensorRt.__version__
    return Engine(
        plan, library, version, capability, 0.0, Counter(), profiles, b"", weight_bytes=len(plan), widening_bytes=0
    )


def run() -> None:
    driver = load_driver()
    if driver is None:
        raise SystemExit("the stand-in for the driver cannot be loaded here")
    driver.set(major=8, minor=7, integrated=1)  # an Orin
    stand_in = (OnnxInPlaceOfTensorRt, SimpleNamespace(first="", forget=lambda: None))
    tensorrt_library.load = lambda library: stand_in  # type: ignore[assignment]
    tensorrt_library.installed = lambda: tensorrt_library.TENSORRT
    engine_build.build_engine = in_place_of_the_compiler  # type: ignore[assignment]
    calls = driver.calls
    try:
        main()
    finally:
        steps = driver.count("cuLaunchKernel", "cuGraphLaunch", "cuStreamSynchronize")
        sys.stderr.write(f"stand-in driver: {driver.calls - calls} calls, {steps} launches and waits\n")


if __name__ == "__main__":
    run()
