"""A checkpoint as GGUF in llama.cpp: the same tokens of many strings, and the same greedy answers as PyTorch here.

    pip install xllamacpp                 # llama.cpp in a wheel; it needs no compiler
    python benchmarks/llama_cpp_parity.py CKPT [--precision fp32] [--strings 2000] [--tokens 64]

It exports CKPT, opens the file in llama.cpp's server on this machine, and prints one JSON object: how many strings have
other tokens, on how many prompts the greedy answers agree, and after how many tokens the others part.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any

import torch

from merino_edge import checkpoint
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "1, 2, 3, 4,",
    "Water boils at",
    "Dear Sir or Madam,",
    "The three primary colours are",
    "SELECT name FROM",
)
WORDS = ["hello", "the", "don't", "I'LL", "they're", "2024", "3.14", "12,000", "x=y;", "fooBar", "HTTPServer"]
WORDS += [
    "__init__",
    "naïve",
    "Zürich",
    "Привет",
    "日本語",
    "한국어",
    "हिन्दी",
    "العربية",
    "½",
    "🦊",
    "👍🏽",
    "\u2018q\u2019",
]
WORDS += ["\u2014", "<b>", "//c", "https://a.b/c?d=e", "100%", "€"]
SPACES = (" ", " ", " ", "", "", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "\u00a0", "\u3000")


def strings(count: int) -> list[str]:
    """Strings of words, numbers, scripts and white space, the same every time."""
    rng = random.Random(0)
    made = ["", " ", "\n", "a", " a"]
    while len(made) < count:
        parts = []
        for _ in range(rng.randint(1, 8)):
            own = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA1, 0x600)))) for _ in range(3))
            parts += [rng.choice((*WORDS, own)), rng.choice(SPACES)]
        made.append(unicodedata.normalize("NFC", "".join(parts)))  # llama.cpp knows no normalization
    return made


class LlamaCpp:
    """llama.cpp's server on this machine."""

    def __init__(self, path: Path, positions: int, *, exact_cache: bool = False) -> None:
        """`exact_cache`: keys and values are kept as float32, not as float16. Raises RuntimeError."""
        import xllamacpp  # pyright: ignore[reportMissingImports]

        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel, options.n_gpu_layers = str(path), positions, 1, 0
        options.warmup, options.verbosity = False, -1
        if exact_cache:
            options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(options)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids with BOS as the file wants it; special tokens are recognised."""
        return list(self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most probable continuation, up to an end token."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True}
        return list(self._post("/completion", {**body, "samplers": ["top_k"], "repeat_penalty": 1.0})["tokens"])


def greedy(model: Model, ids: list[int], count: int, ends: tuple[int, ...]) -> list[int]:
    """The most probable continuation in PyTorch, up to an end token."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < count and not (found and found[-1] in ends):
            found.append(int(model(torch.tensor([ids + found]))[0, -1].argmax()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--strings", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    ckpt, tokenizer = checkpoint.load(given.checkpoint), Tokenizer.load(given.checkpoint)
    model = Model.from_weights(ckpt.architecture, ckpt.weights).eval()
    with tempfile.TemporaryDirectory() as folder:
        written = export_to_gguf(given.checkpoint, Path(folder) / "model.gguf", given.precision)
        llama = LlamaCpp(Path(folder) / "model.gguf", min(2048, ckpt.architecture.max_positions))
        texts = strings(given.strings)
        other = [text for text in texts if llama.encode(text) != tokenizer.encode(text)]
        agreed = []
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt)
            ours, theirs = greedy(model, ids, given.tokens, ckpt.chat.eos_token_ids), llama.greedy(ids, given.tokens)
            pairs = zip(ours, theirs, strict=False)
            agreed.append(next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))))
            agreed[-1] = given.tokens if ours[: len(theirs)] == theirs else agreed[-1]
    result = {"family": written.family, "precision": given.precision, "strings": len(texts), "other_tokens": len(other)}
    print(json.dumps({**result, "first_other": other[:3], "prompts": len(PROMPTS), "equal_tokens": agreed}))


if __name__ == "__main__":
    main()
