"""What `peak_mb` says against what ONNX Runtime's CPU engine holds: python benchmarks/peak_memory.py

For models drawn from the `edge` space and for SmolLM2's shape: the graph with random weights is written to disk, a
fresh process opens it, fills the whole context in prompts of 256 tokens and decodes; its largest resident memory less
what it held with the libraries loaded and nothing open is the measurement. That engine keeps the cache in float32,
twice what `peak_mb` counts for a GPU, so a second column counts it so.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from merino_edge import counts
from merino_edge.architecture import Architecture
from merino_edge.presets import preset
from merino_edge.search.builtin_spaces import EDGE

TOKENS = 256
CHILD = """
import json, sys
import numpy as np
import onnxruntime
from merino_edge.architecture import Architecture
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

def held(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

a = Architecture.from_dict(json.load(open(sys.argv[2])))
before = held("VmRSS:")
engine = OnnxEngine(__import__("pathlib").Path(sys.argv[1]), a, a.max_positions, 2)
for start in range(0, a.max_positions - 8, 256):
    tokens = np.arange(start, min(start + 256, a.max_positions - 8)) % a.vocab_size
    engine.forward(tokens.astype(np.int64), start)
for position in range(a.max_positions - 8, a.max_positions):
    engine.forward(np.array([1]), position)
print(held("VmHWM:") - before)
"""


def measured_bytes(a: Architecture, precision: str, folder: Path) -> int:
    from merino_edge.export.graph import build_model, save
    from merino_edge.weights import random_weights

    graph, shape = folder / "model.onnx", folder / "a.json"
    save(build_model(a, random_weights(a), precision, a.max_positions), graph)
    shape.write_text(json.dumps(a.to_dict()))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(graph), str(shape)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def main() -> None:
    rng = random.Random(0)
    models = [EDGE.architecture(EDGE.sample(rng)) for _ in range(6)]
    models.append(dataclasses.replace(preset("smollm2-135m"), max_positions=1024))
    print(
        "model", "precision", "context", "peak_mb", "with float32 cache", "measured MB", "measured / counted", sep="\t"
    )
    for a in models:
        for precision in ("fp32", "int4"):
            with tempfile.TemporaryDirectory() as folder:
                measured = measured_bytes(a, precision, Path(folder))
            counted = counts.peak_bytes(a, precision, TOKENS)
            missing = (4 - counts.cache_element_bytes(precision)) * a.kv_bytes(element_bytes=1)
            wide = counted + missing
            megabytes = (f"{x / 1e6:.1f}" for x in (counted, wide, measured))
            print(a.id, precision, a.max_positions, *megabytes, f"{measured / wide:.2f}", sep="\t", flush=True)


if __name__ == "__main__":
    main()
