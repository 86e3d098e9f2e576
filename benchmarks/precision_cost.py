"""What each precision costs SmolLM2-135M-Instruct: perplexity on WikiText-2's test text, and megabytes.

    MERINO_DATA=DIR python benchmarks/precision_cost.py --tokens 20480 [--checkpoint DIR] [--spare-mb 1]
    MERINO_DATA=DIR python benchmarks/precision_cost.py --tokens 400000 --forms fp16 int8 int4      # the whole text

Windows of the context, 1024 tokens at most, every one scored but each window's first; word-level text as it is in the
file. Perplexity is PyTorch's with the weights as the bundle stores them; what the exported graph adds to that is
`graph_kl` of every export. SmolLM2's source is a Q4_1 file: fp32 here means its weights as they are. "int4-mixed" is
int4 with as many matrices at int8 as `--spare-mb` has room for (merino-edge export --max-mb).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from wikitext2 import WINDOW, corpora, windows_of_test_text

from merino_edge import checkpoint
from merino_edge.architecture import Architecture
from merino_edge.convert.import_model import import_model
from merino_edge.convert.pretrained import fetch_smollm2
from merino_edge.export import parity
from merino_edge.export.mixed_precision import upgraded_matrices
from merino_edge.export.quantization.calibration import collect_statistics
from merino_edge.export.quantization.stored_weights import StoredWeights, store
from merino_edge.export.targets import Target
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer

FORMS = {  # by name: precision, how it is rounded
    "fp16": ("fp16", ""),
    "int8": ("int8", ""),
    "int4": ("int4", "nearest"),
    "int4-mixed": ("int4", "mixed"),
    "int4-gptq": ("int4", "gptq"),
}


def perplexity(a: Architecture, weights: dict[str, np.ndarray], tokens: np.ndarray) -> float:
    """Of tokens [N, W]."""
    model = Model.from_weights(a, weights).eval()
    total = count = 0.0
    with torch.inference_mode():
        for window in torch.from_numpy(tokens):
            logits = model(window[None])[0, :-1]  # [W - 1, V]
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
    parser.add_argument("--checkpoint", type=Path, help="another model's")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--spare-mb", type=float, default=1.0)
    options = parser.parse_args()
    corpora()
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or Path(folder) / "checkpoint"
        if options.checkpoint is None:
            import_model(fetch_smollm2(), path)
        source = checkpoint.load(path)
        a, weights = source.architecture, source.weights
        window, tokenizer = min(WINDOW, a.max_positions), Tokenizer.load(path)
        tokens = windows_of_test_text(tokenizer, options.tokens, window)
        base = perplexity(a, dict(weights), tokens)
        print(f"{tokens.size} tokens; fp32 perplexity {base:.3f}", flush=True)
        moments = collect_statistics(a, weights).moments if "int4-gptq" in options.forms else None
        for form in options.forms:
            precision, how = FORMS[form]
            target = Target.named("onnxruntime", precision)
            begun = time.perf_counter()
            stored = store(a, weights, target, moments if how == "gptq" else None)
            if how == "mixed":
                seen = tokenizer.encode(parity.TEXT)
                spare_bytes = round(1e6 * options.spare_mb)
                upgraded = upgraded_matrices(source, stored, target, seen, window, max_kl=None, spare_bytes=spare_bytes)
                stored = replace(stored, quantized=stored.quantized | upgraded)
            spent = time.perf_counter() - begun
            as_stored = replace(a, tied_head=a.tied_head and not stored.own_head)
            found = perplexity(as_stored, stored.dequantize(), tokens)
            print(
                f"{form:<10} perplexity {found:.3f} ({100 * (found / base - 1):+.2f} %), "
                f"weights {megabytes(stored):.1f} MB, rounded in {spent:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
