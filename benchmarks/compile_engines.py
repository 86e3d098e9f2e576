"""Every preset, lowering and precision that TensorRT takes, parsed and compiled by TensorRT for RTX without a GPU.

    python benchmarks/compile_engines.py                          # SM86: 10 presets, 7 forms, half an hour and more
    python benchmarks/compile_engines.py --shrunk --capability SM75 SM86 SM89 SM120     # with two layers each
    python benchmarks/compile_engines.py --capability SM75 SM86 SM89 SM120 --preset smollm2-135m merino-61m

Prints one line each (engine bytes, seconds, the process's largest memory over the graph's, fused layers) and the count
of those that compiled; exit code 1 if one did not. Weights are random: they do not change what is compiled. What a
capability has no kernel for is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from merino_edge.errors import MerinoError
from merino_edge.export.graph import build_stored, save
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import PLATFORMS, Target
from merino_edge.export.tensorrt import NO_KERNEL, build_engine
from merino_edge.presets import PRESETS, preset, shrunk
from merino_edge.runtime.memory import peak_memory_mb
from merino_edge.tensorrt_library import RTX


def compiled(graph: Path, context: int, capability: str) -> str:
    """A line of what came out. Raises MerinoError."""
    engine = build_engine(RTX, graph, context, capability)
    graph_bytes = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    peak_bytes = 1e6 * peak_memory_mb()
    fused = f"{engine.layers['ATTENTION_INPUT']} attention, {engine.layers['KV_CACHE_UPDATE']} cache updates"
    return (
        f"{len(engine.plan) / 1e6:8.1f} MB {engine.seconds:5.1f} s, graph {graph_bytes / 1e6:.1f} MB, "
        f"peak {peak_bytes / 1e6:.0f} MB ({peak_bytes / graph_bytes:.1f}), {fused}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--capability", nargs="+", default=["SM86"])
    parser.add_argument("--context", type=int)
    parser.add_argument("--shrunk", action="store_true", help="two layers of each width, a small vocabulary")
    options = parser.parse_args()
    forms = [(low, p) for p in PLATFORMS["rtx"].precisions for low in PLATFORMS["rtx"].lowerings_at(p)]
    done = tried = 0
    for name in options.preset:
        for lowering, precision in forms:
            a, target = (shrunk if options.shrunk else preset)(name), Target.named("rtx", precision, lowering)
            context = options.context or min(512, a.max_positions)
            with tempfile.TemporaryDirectory() as folder:
                graph = Path(folder) / "model.onnx"
                model = build_stored(a, random_stored(a, target), target, context)
                save(model, graph)
                for capability in options.capability:
                    if (capability, precision) in NO_KERNEL:
                        continue
                    tried += 1
                    form = f"{name:<18} {lowering:<9} {precision:<5} {capability:<6}"
                    with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # for a peak memory of its own
                        try:
                            print(form, alone.submit(compiled, graph, context, capability).result(), flush=True)
                            done += 1
                        except MerinoError as error:
                            print(form, error, flush=True)
    print(f"{done} of {tried} compiled")
    sys.exit(done != tried)


if __name__ == "__main__":
    main()
