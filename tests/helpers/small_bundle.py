"""Fixtures: a small real bundle (random weights, byte-level BPE, a chat template), its engine and its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from merino_edge import bundle
from merino_edge.architecture import Architecture, Block
from merino_edge.data.bpe import train_tokenizer
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.tokenizer import ChatFormat, Tokenizer
from merino_edge.weights import weight_shapes

CONTEXT = 320  # more than one prefill chunk
TEXT = "The quick brown fox jumps over the lazy dog. 🦊🐕 Zwölf Boxkämpfer jagen Viktor quer über den großen Deich. "
WITH_TEMPLATE = ChatFormat(
    chat_template="{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant> "
)

Weights = dict[str, np.ndarray]


def small_architecture(vocab_size: int) -> Architecture:
    block = Block(64, 2, 2, 1, 96)
    return Architecture(
        vocab_size,
        CONTEXT,
        64,
        32,
        (block,),
        norm="rmsnorm",
        ffn="swiglu",
        bias="none",
        positions="rotary",
        rotary_dim=32,
    )


def lively_weights(a: Architecture, seed: int = 0) -> Weights:
    """Random weights large enough that the next token depends on the text and not only on the last token."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal(shape) * (2.0 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2) + (len(shape) == 1)
        ).astype(np.float32)
        for name, shape in weight_shapes(a).items()
    }


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return str(train_tokenizer(iter([TEXT] * 4), 320).to_str())


@pytest.fixture(scope="session")
def small_model(tokenizer_json: str) -> tuple[Architecture, Weights]:
    a = small_architecture(tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab_size())
    return a, lively_weights(a)


@pytest.fixture(scope="session")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str, small_model: tuple[Architecture, Weights]
) -> Callable[..., Path]:
    """A bundle of the small architecture with the given weights and chat format."""

    def make(weights: Weights, chat: ChatFormat = WITH_TEMPLATE, context: int = CONTEXT) -> Path:
        a, folder = replace(small_model[0], max_positions=context), tmp_path_factory.mktemp("bundle")
        (folder / "model.onnx").write_bytes(to_bytes(build_model(a, weights, "fp32", context)))
        (folder / "tokenizer.json").write_text(tokenizer_json)
        (folder / "chat.json").write_text(chat.to_json())
        bundle.write_manifest(folder, a, "fp32", "onnxruntime", context)
        return folder

    return make


@pytest.fixture(scope="session")
def bundle_path(make_bundle: Callable[..., Path], small_model: tuple[Architecture, Weights]) -> Path:
    """The bundle, with a chat template and no end token, so that an answer ends only where a test ends it."""
    return make_bundle(small_model[1])


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Iterator[Engine]:
    engine, _, _ = open_engine(bundle_path, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def tokenizer(bundle_path: Path) -> Tokenizer:
    return Tokenizer.load(bundle_path)
