"""What `--peak-mb` counts for TensorRT against what its compiler reserves: python benchmarks/engine_memory.py

For models drawn from the `edge` space and for SmolLM2's shape, the graph for `rtx` with random weights is compiled for
SM86, without a GPU. The compiler's log says how much memory a context of each of the two profiles takes, and how much
the weights take. With the cache and the buffers of a step that is what an engine holds on a GPU, beside CUDA's own
memory. It was not compared with a board.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
from typing import Any

from merino_edge import counts, tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.presets import preset
from merino_edge.runtime.engines.plan_tensors import bound_tensors, buffer_bytes
from merino_edge.search.budget import Metric
from merino_edge.search.builtin_spaces import EDGE
from merino_edge.search.costs import CostModel
from merino_edge.search.space import Vocabulary

TARGET = "rtx"


def log_lines(lines: list[str]) -> Any:
    """A stand-in for `tensorrt_library.new_log` that also keeps the lines about memory."""
    usual = tensorrt_library.new_log

    def new_log(trt: Any) -> Any:
        class Log(type(usual(trt))):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if re.match(r"Total (Activation|Weights) Memory", message):
                    lines.append(message)
                super().log(severity, message)

            def forget(self) -> None:
                lines.clear()
                super().forget()

        return Log()

    return new_log


def reserved_bytes(a: Architecture, precision: str, lowering: str, lines: list[str]) -> int:
    """Bytes of weights, activations of both profiles, cache and buffers, by the compiler's log."""
    target = Target.named(TARGET, precision, lowering)
    graph = to_bytes(build_stored(a, random_stored(a, target), target, a.max_positions))
    lines.clear()
    engine = build_engine(tensorrt_library.RTX, graph, a.max_positions, "SM86")
    logged = sum(int(found[1]) for line in lines if (found := re.search(r"(\d+) bytes", line)))
    prefix = "row_" if target.lowering == "primitive" else "new_"
    dtype = "float32" if precision == "fp32" else "float16"
    tensors = bound_tensors(a, a.max_positions, prefix, dtype, one_row=False)
    longest = max(most for _, _, most in engine.profiles)
    return logged + sum(buffer_bytes(tensors, longest, 8).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=int, default=2)
    options = parser.parse_args()
    rng, lines = random.Random(options.seed), list[str]()
    tensorrt_library.new_log = log_lines(lines)
    models = {}
    for _ in range(options.models):
        a = EDGE.architecture(EDGE.sample(rng))
        models[a.id] = a
    models["smollm2-135m"] = dataclasses.replace(preset("smollm2-135m"), max_positions=1024)
    print("model", "precision", "counted MB", "reserved MB", "off %", sep="\t")
    for name, a in models.items():
        for precision in counts.PRECISIONS:
            lowering = "primitive" if precision == "fp32" else "native"
            cost_model = CostModel(precision, target=TARGET)
            counted = 1e6 * cost_model.metric_cost(Metric("peak_mb", 1), Vocabulary(a.vocab_size)).value(a)
            reserved = reserved_bytes(a, precision, lowering, lines)
            shown = (f"{x / 1e6:.1f}" for x in (counted, reserved))
            print(name, precision, *shown, f"{100 * (counted / reserved - 1):+.1f}", sep="\t", flush=True)


if __name__ == "__main__":
    main()
