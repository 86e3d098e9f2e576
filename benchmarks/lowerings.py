"""Decode and prefill of one model by each lowering, under ONNX Runtime on the CPU, interleaved.

    python benchmarks/lowerings.py --preset smollm2-135m --precision int4 --rounds 9 --threads 2

Random weights (they do not change how long a step takes). Medians over rounds with their spread (1.4826 MAD), and the
ratio to `native` round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from interleaved import print_speeds

from merino_edge.counts import PRECISIONS
from merino_edge.export.graph import build_stored, save
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.presets import PRESETS, preset
from merino_edge.runtime.engines.onnx_engine import OnnxEngine


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
        print_speeds(engines, options.prompt_tokens, options.new_tokens, options.rounds, "native")


if __name__ == "__main__":
    main()
