"""A tiny checkpoint that has every part of a model that export must write."""

from __future__ import annotations

import pytest

from helpers.random_model import random_model
from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.export.parity import TEXT

TINY = Architecture(
    vocab_size=300,
    max_positions=192,
    embedding_width=64,
    head_dim=32,
    blocks=(Block(64, 2, 2, 1, 96, shared=True), Block(96, 1, 3, 3, 96)),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=32,
    bias="none",
)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with strong random weights, a shared block, a width projection and grouped-query attention."""
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tokenizer = train_tokenizer(iter([TEXT]), TINY.vocab_size)
    checkpoint.save(
        path,
        TINY,
        random_model(TINY, strength=1.0),
        tokenizer_json=tokenizer.to_str(),
        chat=chat_format(),
        training={"source": "random"},
    )
    return checkpoint.load(path)
