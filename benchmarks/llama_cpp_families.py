"""Tiny random models of every family of GGUF: the same greedy answers in llama.cpp as in PyTorch here.

    pip install xllamacpp                 # llama.cpp in a wheel; it needs no compiler
    python benchmarks/llama_cpp_families.py [--only phi] [--tokens 32] [--prompts 4]

Each model of transformers becomes a file as llama.cpp's converter writes it ("in"), which is imported and compared with
llama.cpp on the same file. What is imported goes out again ("out"), and that file is compared too. A row has the equal
tokens of each prompt. Where they part, the gap between our two best logits is printed, as a share of the largest one.
llama.cpp keeps its cache in float32 here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from llama_cpp_parity import LlamaCpp, greedy

from helpers.tiny_gguf import MODELS, tiny_model, write
from merino_edge import checkpoint
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.errors import MerinoError
from merino_edge.pytorch.model import Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name begins so")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    given = parser.parse_args()
    other = 0
    print("| model | family | in | out |\n|---|---|---|---|", flush=True)
    for name, (family, _) in MODELS.items():
        if not name.startswith(given.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            theirs = write(name, tiny_model(name), Path(folder) / "in.gguf")
            a = import_model(theirs, Path(folder) / "ckpt")
            model = Model.from_weights(a, checkpoint.load(Path(folder) / "ckpt").weights).eval()
            rng = np.random.default_rng(0)
            prompts = [rng.integers(3, 260, 8).tolist() for _ in range(given.prompts)]
            wanted = [greedy(model, prompt, given.tokens, (2,)) for prompt in prompts]
            cells = []
            for file in (theirs, Path(folder) / "out.gguf"):
                try:
                    if file != theirs:
                        export_to_gguf(Path(folder) / "ckpt", file, "fp32")
                    llama = LlamaCpp(file, a.max_positions, exact_cache=True)
                    got = [llama.greedy(prompt, given.tokens) for prompt in prompts]
                except (MerinoError, RuntimeError) as error:
                    cells.append(str(error).replace("|", "/"))
                    continue
                told = [_told(model, *three) for three in zip(prompts, wanted, got, strict=True)]
                other += sum("gap" in answer for answer in told)
                cells.append(", ".join(told))
        print(f"| {name} | {family} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{other} answers differ")


def _told(model: Model, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
    """How many tokens are equal before the first difference, and how near a tie that one is."""
    differing = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    equal = next(differing, min(len(ours), len(theirs)))
    if equal == len(ours):
        return f"{equal}/{len(ours)}"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:equal]]))[0, -1]
    best, second = logits.topk(2).values.tolist()
    return f"{equal}/{len(ours)} (gap {(best - second) / float(logits.abs().max()):.0e})"


if __name__ == "__main__":
    main()
