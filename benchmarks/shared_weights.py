"""Where layers share weights, are they stored once: in the file, in ONNX Runtime's memory, in a TensorRT engine? And
what does sharing cost or save in time?

    python benchmarks/shared_weights.py --preset merino-61m [--compile]
    python benchmarks/shared_weights.py --decode --threads 2

It compares three forms at every precision: the preset, whose blocks share weights; "own", with weights of their own
for every layer; and "few", with one layer a block, which has as many weights as the shared form. Memory is the
largest of a process that fills a context of 256, less what its libraries take (benchmarks/peak_memory.py).
`--compile` adds engines by TensorRT for RTX, for SM86; `--decode` times the three in turns instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from interleaved import print_speeds
from peak_memory import measured_bytes

from merino_edge.architecture import Architecture
from merino_edge.counts import PRECISIONS
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.presets import PRESETS, preset
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tensorrt_library import RTX

CONTEXT = 256


def forms(a: Architecture) -> dict[str, Architecture]:
    a = dataclasses.replace(a, max_positions=CONTEXT)
    own = tuple(dataclasses.replace(block, shared=False) for block in a.blocks)
    few = tuple(dataclasses.replace(block, layers=1) for block in own)
    return {"shared": a, "own": dataclasses.replace(a, blocks=own), "few": dataclasses.replace(a, blocks=few)}


def time_in_turns(a: Architecture, threads: int, rounds: int) -> None:
    for precision in PRECISIONS:
        print(f"--- {precision}", flush=True)
        target = Target.named("onnxruntime", precision)
        engines = {
            name: OnnxEngine(
                to_bytes(build_stored(form, random_stored(form, target), target, CONTEXT)), form, CONTEXT, threads
            )
            for name, form in forms(a).items()
        }
        print_speeds(engines, 128, 64, rounds, "own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="merino-61m", choices=PRESETS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.decode:
        time_in_turns(preset(options.preset), options.threads, options.rounds)
        return
    print("precision", "weights", "million weights", "file MB", "memory MB", "engine MB", sep="\t")
    for precision in PRECISIONS:
        for name, a in forms(preset(options.preset)).items():
            with tempfile.TemporaryDirectory() as folder:
                memory_mb = measured_bytes(a, precision, Path(folder)) / 1e6
                file_mb = sum(file.stat().st_size for file in Path(folder).glob("model.onnx*")) / 1e6
            engine = ""
            if options.compile:
                target = Target.named("rtx", precision)
                graph = to_bytes(build_stored(a, random_stored(a, target), target, CONTEXT))
                engine = f"{len(build_engine(RTX, graph, CONTEXT, 'SM86').plan) / 1e6:.1f}"
            columns = (f"{a.parameters / 1e6:.1f}", f"{file_mb:.1f}", f"{memory_mb:.1f}", engine)
            print(precision, name, *columns, sep="\t", flush=True)


if __name__ == "__main__":
    main()
