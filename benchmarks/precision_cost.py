"""What each precision costs SmolLM2-135M-Instruct: perplexity on WikiText-2's test text, and megabytes.

    MERINO_DATA=DIR python benchmarks/precision_cost.py --tokens 20480

Windows of 1024 tokens, every one scored but each window's first; word-level text as it is in the file. Perplexity is
PyTorch's with the weights as the bundle stores them; what the exported graph adds to that is `graph_kl` of every
export. The source is a Q4_1 file: fp32 here means its weights as they are.
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from merino_edge import checkpoint
from merino_edge.architecture import Architecture
from merino_edge.convert import import_model
from merino_edge.export.calibration import input_moments
from merino_edge.export.quantize import StoredWeights, store
from merino_edge.export.targets import Target
from merino_edge.model import Model
from merino_edge.pretrained import fetch_smollm2
from merino_edge.tokenizer import Tokenizer

WINDOW = 1024
MAX_CHARACTERS = 1_000_000  # more than a tokenizer takes at once is refused


def perplexity(a: Architecture, weights: dict[str, np.ndarray], tokens: np.ndarray) -> float:
    """Of tokens [N * WINDOW]."""
    model = Model.from_weights(a, weights).eval()
    total = count = 0.0
    with torch.inference_mode():
        for window in torch.from_numpy(tokens).view(-1, WINDOW):
            logits = model(window[None])[0, :-1]  # [WINDOW - 1, V]
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count)


def megabytes(stored: StoredWeights) -> float:
    plain = sum(array.nbytes for array in stored.arrays.values())
    codes = sum(q.stored_bytes for q in stored.quantized.values())
    return (plain + codes) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    options = parser.parse_args()
    if "MERINO_DATA" not in os.environ:
        sys.exit("set MERINO_DATA to the folder of corpora")
    packed = (Path(os.environ["MERINO_DATA"]) / "lm/wikitext2_test.txt.xz").read_bytes()
    text = lzma.decompress(packed).decode()
    with tempfile.TemporaryDirectory() as folder:
        import_model(fetch_smollm2(), Path(folder) / "checkpoint")
        source = checkpoint.load(Path(folder) / "checkpoint")
        tokens = np.array(
            Tokenizer.load(source.path).encode(text[:MAX_CHARACTERS])[: options.tokens // WINDOW * WINDOW], np.int64
        )
        a, weights = source.architecture, source.weights
        base = perplexity(a, dict(weights), tokens)
        print(f"{len(tokens)} tokens; fp32 perplexity {base:.3f}", flush=True)
        begun = time.perf_counter()
        moments = input_moments(a, weights)
        print(f"calibration text drawn in {time.perf_counter() - begun:.1f} s", flush=True)
        for precision, rounding in (("fp16", ""), ("int8", ""), ("int4", "nearest"), ("int4", "gptq")):
            target = Target.named("onnxruntime", precision)
            begun = time.perf_counter()
            stored = store(a, weights, target, moments if rounding == "gptq" else None)
            spent = time.perf_counter() - begun
            as_stored = replace(a, tied_head=a.tied_head and not stored.own_head)
            found = perplexity(as_stored, stored.restore(), tokens)
            print(
                f"{precision} {rounding:<8} perplexity {found:.3f} ({100 * (found / base - 1):+.2f} %), "
                f"weights {megabytes(stored):.1f} MB, rounded in {spent:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
