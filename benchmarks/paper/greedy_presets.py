"""200 greedy tokens of every preset by every lowering that ONNX Runtime runs, fp32, against PyTorch.

    python benchmarks/paper/greedy_presets.py

The weights are random, and strong enough that logits differ. The exported model chooses a token, and PyTorch must
choose the same one after the same tokens. A difference of logits below 0.001 counts as a tie. Exit code 1 unless all
are equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from merino_edge.export import parity
from merino_edge.export.graph import build_model, save
from merino_edge.export.targets import LOWERINGS
from merino_edge.presets import PRESETS, preset
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.weights import random_weights

PROMPT, NEW = 16, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=PRESETS, choices=PRESETS)
    options = parser.parse_args()
    failed = 0
    for name in options.preset:
        a = preset(name)
        weights = {key: (4 * w if w.ndim > 1 else w) for key, w in random_weights(a).items()}
        reference = parity.TorchReference(a, weights)
        start = np.random.default_rng(0).integers(0, a.vocab_size, PROMPT)
        for lowering in LOWERINGS:
            with tempfile.TemporaryDirectory() as folder:
                graph = Path(folder) / "model.onnx"
                model = build_model(a, weights, "fp32", PROMPT + NEW, lowering=lowering)
                save(model, graph)
                del model
                engine = OnnxEngine(graph, a, PROMPT + NEW)
                equal = parity.greedy_agreement(reference, engine, start, NEW)
                engine.close()
            failed += equal != NEW
            print(f"{name:<18} {lowering:<9} {equal} of {NEW} equal", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
