"""Every preset, lowering and precision that TensorRT takes, parsed and compiled by TensorRT for RTX without a GPU.

    python benchmarks/compile_engines.py                          # SM86: 10 presets, 7 forms
    python benchmarks/compile_engines.py --capability SM75 SM86 SM89 SM120 --preset smollm2-135m merino-61m

Prints one line each (engine bytes, seconds, fused layers) and the count of those that compiled; exit code 1 if one did
not. Weights are random: they do not change what is compiled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from merino_edge.errors import MerinoError
from merino_edge.export.graph import build_stored, save
from merino_edge.export.quantize import random_stored
from merino_edge.export.targets import PLATFORMS, Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.presets import PRESETS, preset
from merino_edge.tensorrt_library import RTX


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--capability", nargs="+", default=["SM86"])
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    forms = [(low, p) for p in PLATFORMS["rtx"].precisions for low in PLATFORMS["rtx"].able(p)]
    done = tried = 0
    for name in options.preset:
        for lowering, precision in forms:
            a, target = preset(name), Target.named("rtx", precision, lowering)
            with tempfile.TemporaryDirectory() as folder:
                graph = Path(folder) / "model.onnx"
                model = build_stored(a, random_stored(a, target), target, options.context)
                save(model, graph)
                for capability in options.capability:
                    tried += 1
                    form = f"{name:<18} {lowering:<9} {precision:<5} {capability:<6}"
                    try:
                        engine = build_engine(RTX, graph, options.context, capability)
                    except MerinoError as error:
                        print(f"{form} {error}", flush=True)
                        continue
                    done += 1
                    kinds = engine.layers
                    fused = f"{kinds['ATTENTION_INPUT']} attention, {kinds['KV_CACHE_UPDATE']} cache updates"
                    size = f"{len(engine.plan) / 1e6:8.1f} MB (weights {a.weight_bytes(precision) / 1e6:.1f})"
                    print(f"{form} {size} {engine.seconds:5.1f} s, {fused}", flush=True)
    print(f"{done} of {tried} compiled")
    sys.exit(done != tried)


if __name__ == "__main__":
    main()
