"""Whether a found model is as fast as predicted: python benchmarks/found_against_public.py RESULT.json [PRESET]

It builds both with random weights (latency does not depend on values) at the result's precision. Then it times decode
steps at 256 positions on one thread, interleaved over nine rounds. It prints each and the ratio.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

import numpy as np

from merino_edge import architecture
from merino_edge.architecture import Architecture
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.presets import preset
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.weights import random_weights

LENGTH, STEPS, ROUNDS = 256, 40, 9


def engine(a: Architecture, precision: str) -> OnnxEngine:
    return OnnxEngine(to_bytes(build_model(a, random_weights(a), precision, LENGTH)), a, LENGTH, threads=1)


def step_ms(opened: OnnxEngine) -> float:
    """The median step at the last position of a full cache."""
    opened.forward(np.arange(LENGTH - 1) % opened.vocab_size, 0)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        opened.forward(np.array([1]), LENGTH - 1)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    path, name = sys.argv[1], (sys.argv[2:] or ["smollm2-135m"])[0]
    found, document = architecture.load(path)
    precision = document["precision"]
    models = {path: found, name: dataclasses.replace(preset(name), max_positions=max(LENGTH, found.max_positions))}
    engines = {label: engine(a, precision) for label, a in models.items()}
    rounds = [{label: step_ms(opened) for label, opened in engines.items()} for _ in range(ROUNDS)]
    for label in engines:
        samples = [one[label] for one in rounds]
        print(f"{label}: {statistics.median(samples):.3f} ms ({min(samples):.3f} - {max(samples):.3f})")
    ratios = [one[path] / one[name] for one in rounds]
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f}), {precision}, 1 thread")
    predicted = {key: ms for key, ms in document["costs"].items() if key.startswith("decode_ms")}
    print(f"predicted {predicted}")


if __name__ == "__main__":
    main()
