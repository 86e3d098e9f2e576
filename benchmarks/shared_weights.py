"""Where layers share weights, are they stored once: in the file, in ONNX Runtime's memory, in a TensorRT engine?

    python benchmarks/shared_weights.py --preset merino-61m [--compile]

Every precision, as the preset shares its blocks' weights and with weights of their own for every layer. Memory is the
largest of a process that fills a context of 256, less what its libraries take (benchmarks/peak_memory.py). `--compile`
adds engines by TensorRT for RTX, for SM86.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from peak_memory import measured_bytes

from merino_edge.architecture import Architecture
from merino_edge.counts import PRECISIONS
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantize import random_stored
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.presets import PRESETS, preset
from merino_edge.tensorrt_library import RTX

CONTEXT = 256


def sharing(a: Architecture, shared: bool) -> Architecture:
    blocks = tuple(dataclasses.replace(block, shared=shared and block.shared) for block in a.blocks)
    return dataclasses.replace(a, blocks=blocks, max_positions=CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="merino-61m", choices=PRESETS)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    print("precision", "shared", "million weights", "file MB", "memory MB", "engine MB", sep="\t")
    for precision in PRECISIONS:
        for shared in (True, False):
            a = sharing(preset(options.preset), shared)
            with tempfile.TemporaryDirectory() as folder:
                memory_mb = measured_bytes(a, precision, Path(folder)) / 1e6
                file_mb = sum(file.stat().st_size for file in Path(folder).glob("model.onnx*")) / 1e6
            engine = ""
            if options.compile:
                target = Target.named("rtx", precision)
                graph = to_bytes(build_stored(a, random_stored(a, target), target, CONTEXT))
                engine = f"{len(build_engine(RTX, graph, CONTEXT, 'SM86').plan) / 1e6:.1f}"
            columns = (f"{a.parameters / 1e6:.1f}", f"{file_mb:.1f}", f"{memory_mb:.1f}", engine)
            print(precision, shared, *columns, sep="\t", flush=True)


if __name__ == "__main__":
    main()
