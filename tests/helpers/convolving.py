"""A small model with short convolutions of two kinds beside attention, and what PyTorch computes with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.bundle import Bundle
from merino_edge.pytorch.model import Model

TAPS, CONTEXT = 4, 600
A = Architecture(
    96, CONTEXT, 64, 32,
    (Block(64, 2, 2, 1, 64, convolution=TAPS), Block(64, 1, 2, 1, 64), Block(96, 1, 3, 1, 64, convolution=3)),
    norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=32, bias="none", qk_norm="head",
    convolution_bias=True,
)  # fmt: skip
WEIGHTS = random_model(A)
TOKENS = np.random.default_rng(0).integers(0, A.vocab_size, CONTEXT)


def expected(tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of tokens [T]."""
    with torch.no_grad():
        return np.asarray(Model.from_weights(A, WEIGHTS)(torch.from_numpy(tokens)[None])[0].numpy())


def written_for(a: Architecture) -> Bundle:
    """A bundle without files, as a prompt cache asks for one."""
    return Bundle(Path("b"), a, "fp32", "onnxruntime", CONTEXT, {"files": {"model.onnx": {"sha256": "0"}}})
