"""Small honest models, made by the writers of the program itself. All loaders share them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fuzz.draft import Files

from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.errors import InputError
from merino_edge.tokenizer import ChatFormat
from merino_edge.weights import weight_shapes

TEXT = "The quick brown fox jumps over the lazy dog. 🦊 Zwölf Boxkämpfer jagen Viktor quer über den großen Deich. "
PROMPT = "The quick brown fox"
HELLO = [{"role": "user", "content": PROMPT}]
TINY = Architecture(
    vocab_size=264,
    max_positions=128,
    embedding_width=32,
    head_dim=16,
    blocks=(Block(32, 2, 2, 1, 32, shared=True),),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=16,
    bias="none",
)


def files_of(folder: Path) -> Files:
    """All files below a folder, by their path in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def written(write: Callable[[Path], object]) -> Files:
    """The files that `write` makes in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return files_of(Path(folder))


def content(path: Path) -> bytes:
    """The bytes of a file that no loader of ours reads: a user hands them over."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing", "give one") from None


def weights(a: Architecture) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) * np.float32(0.3) for name, shape in weight_shapes(a).items()}


@functools.cache
def tokenizer_json() -> str:
    return str(train_tokenizer(iter([TEXT] * 4), TINY.vocab_size).to_str())


def save_checkpoint(path: Path, a: Architecture = TINY, chat: ChatFormat | None = None) -> None:
    chat = chat or chat_format(conversations=True)
    training = {"source": "train", "step": 3, "history": [[1, 5.5], [3, 5.25]], "validation_loss": 5.25}
    checkpoint.save(path, a, weights(a), tokenizer_json=tokenizer_json(), chat=chat, training=training)
