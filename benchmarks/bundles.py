"""Decode and prefill of bundles of one model, under ONNX Runtime on the CPU, interleaved.

    python benchmarks/bundles.py smollm2-fp32 smollm2-fp16 smollm2-int8 smollm2-int4 --rounds 9 --threads 2

Medians over rounds with their spread (1.4826 MAD), and the ratio to the first bundle round by round.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from interleaved import print_speeds

from merino_edge import bundle
from merino_edge.runtime.engines.onnx_engine import OnnxEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        engines = {
            path.name: stack.enter_context(
                contextlib.closing(OnnxEngine.from_bundle(bundle.load(path), options.threads))
            )
            for path in options.bundles
        }
        print_speeds(engines, options.prompt_tokens, options.new_tokens, options.rounds, options.bundles[0].name)


if __name__ == "__main__":
    main()
