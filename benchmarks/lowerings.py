"""Decode and prefill of one model by each lowering, under ONNX Runtime on the CPU, interleaved.

    python benchmarks/lowerings.py --preset smollm2-135m --precision int4 --rounds 9 --threads 2

Random weights (they do not change how long a step takes). Medians over rounds with their spread (1.4826 MAD), and the
ratio to `native` round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from merino_edge.counts import PRECISIONS
from merino_edge.export.graph import build_stored, save
from merino_edge.export.quantize import random_stored
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.measurement import spread_percent
from merino_edge.presets import PRESETS, preset
from merino_edge.runtime.onnx_engine import OnnxEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m", choices=PRESETS)
    parser.add_argument("--precision", default="int4", choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    a = preset(options.preset)
    tokens = np.random.default_rng(0).integers(0, a.vocab_size, options.prompt_tokens)
    times: dict[tuple[str, str], list[float]] = {
        (name, kind): [] for name in LOWERINGS for kind in ("decode", "prefill")
    }
    with contextlib.ExitStack() as stack:
        engines = {}
        for lowering in LOWERINGS:
            target = Target.named("onnxruntime", options.precision, lowering)
            graph = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
            model = build_stored(a, random_stored(a, target), target, options.context)
            save(model, graph)
            engines[lowering] = stack.enter_context(
                contextlib.closing(OnnxEngine(graph, a, options.context, options.threads))
            )
            engines[lowering].forward(tokens, 0)
        for number in range(options.rounds):
            for lowering in LOWERINGS if number % 2 else LOWERINGS[::-1]:
                engine = engines[lowering]
                begun = time.perf_counter()
                engine.forward(tokens, 0)
                between = time.perf_counter()
                for position in range(len(tokens), len(tokens) + options.new_tokens):
                    engine.forward(tokens[:1], position)
                ended = time.perf_counter()
                times[lowering, "prefill"].append(1e3 * (between - begun) / len(tokens))
                times[lowering, "decode"].append(1e3 * (ended - between) / options.new_tokens)
    for kind in ("decode", "prefill"):
        for lowering in LOWERINGS:
            mine, native = times[lowering, kind], times["native", kind]
            ratio = statistics.median(n / m for n, m in zip(native, mine, strict=True))
            spread = f"spread {spread_percent(mine):4.1f} %"
            print(f"{kind:<8} {lowering:<9} {statistics.median(mine):8.3f} ms a token, {spread}, {ratio:.2f} x native")


if __name__ == "__main__":
    main()
