"""What `--peak-mb` counts for `onnxruntime` against what that engine holds: python benchmarks/peak_memory.py

For models drawn from the `edge` space and for SmolLM2's shape, at every precision, the graph with random weights is
written to disk. A fresh process opens it, fills the whole context in prompts of 256 tokens and decodes. Measured is
its largest resident memory, less what it held with the libraries loaded and nothing open. The largest part of that is
anonymous; the rest is pages of the library and of the weights' file. Both are printed at the end of the run.

The constants of merino_edge.search.peak_memory were fitted to models of `--seed 0`. The default draws others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from merino_edge.architecture import Architecture
from merino_edge.counts import PRECISIONS
from merino_edge.presets import preset
from merino_edge.search.budget import Metric
from merino_edge.search.builtin_spaces import EDGE
from merino_edge.search.costs import CostModel
from merino_edge.search.space import Vocabulary

TARGET, TOKENS = "onnxruntime", 256
CHILD = """
import json, sys
import numpy as np
import onnxruntime
from pathlib import Path
from merino_edge.architecture import Architecture
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

def held(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))

a = Architecture.from_dict(json.load(open(sys.argv[2])))
before = {field: held(field) for field in ("VmRSS", "RssAnon", "RssFile")}
engine = OnnxEngine(Path(sys.argv[1]), a, a.max_positions, 2)
for start in range(0, a.max_positions - 8, 256):
    tokens = np.arange(start, min(start + 256, a.max_positions - 8)) % a.vocab_size
    engine.forward(tokens.astype(np.int64), start)
for position in range(a.max_positions - 8, a.max_positions):
    engine.forward(np.array([1]), position)
after = {field: held(field) for field in ("RssAnon", "RssFile")}
print(json.dumps([held("VmHWM") - before["VmRSS"], *(after[field] - before[field] for field in after)]))
"""


def measured_bytes(a: Architecture, precision: str) -> list[int]:
    """The largest resident memory, and the anonymous and the file's part of it at the end."""
    from merino_edge.export.graph import build_stored, save
    from merino_edge.export.quantization.stored_weights import random_stored
    from merino_edge.export.targets import Target

    target = Target.named(TARGET, precision)
    with tempfile.TemporaryDirectory() as name:
        graph, shape = Path(name) / "model.onnx", Path(name) / "a.json"
        save(build_stored(a, random_stored(a, target), target, a.max_positions), graph)
        shape.write_text(json.dumps(a.to_dict()))
        command = [sys.executable, "-c", CHILD, str(graph), str(shape)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def counted_bytes(a: Architecture, precision: str) -> float:
    cost_model = CostModel(precision, target=TARGET)
    return 1e6 * cost_model.metric_cost(Metric("peak_mb", TOKENS), Vocabulary(a.vocab_size)).value(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=int, default=6)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    models = {}
    for _ in range(options.models):
        a = EDGE.architecture(EDGE.sample(rng))
        models[a.id] = a
    models["smollm2-135m"] = dataclasses.replace(preset("smollm2-135m"), max_positions=1024)
    print("model", "precision", "context", "counted MB", "measured MB", "anonymous", "file", "off %", sep="\t")
    errors = []
    for name, a in models.items():
        for precision in PRECISIONS:
            peak, anonymous, file = measured_bytes(a, precision)
            counted = counted_bytes(a, precision)
            errors.append(100 * (counted / peak - 1))
            megabytes = (f"{x / 1e6:.1f}" for x in (counted, peak, anonymous, file))
            print(name, precision, a.max_positions, *megabytes, f"{errors[-1]:+.1f}", sep="\t", flush=True)
    sizes = [abs(error) for error in errors]
    print(f"largest difference {max(sizes):.1f} %, on average {statistics.fmean(sizes):.1f} %")


if __name__ == "__main__":
    main()
