"""Hugging Face folders of tiny models, written without transformers, and what an import makes of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.random_model import random_model
from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_huggingface import export_to_huggingface
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.export.parity import TEXT

LLAMA = Architecture(
    vocab_size=320,
    max_positions=64,
    embedding_width=32,
    head_dim=16,
    blocks=(Block(32, 2, 2, 1, 48),),
    tied_head=False,
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=16,
    bias="none",
)
GPT2 = Architecture(320, 64, 32, 16, (Block(32, 2, 2, 2, 48),), ffn="gelu_tanh")


def save(folder: Path, a: Architecture = LLAMA) -> Path:
    """Write a model of random weights, and return `folder`."""
    ckpt = folder.with_name(f"{folder.name}-checkpoint")
    tokenizer = train_tokenizer(iter([TEXT]), a.vocab_size - 20)  # as many published models, it has spare rows
    checkpoint.save(
        ckpt, a, random_model(a), tokenizer_json=tokenizer.to_str(), chat=chat_format(), training={"source": "random"}
    )
    export_to_huggingface(ckpt, folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file. The value None removes a field."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    """The weights of a folder's one file."""
    found: dict[str, np.ndarray] = load_file(folder / name)
    return found


def put_weights(folder: Path, values: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    """Write a file of weights."""
    save_file({key: np.ascontiguousarray(value) for key, value in values.items()}, folder / name, {"format": "pt"})


def imported(source: Path | str, out: Path, **options: Any) -> dict[str, np.ndarray]:
    """The weights of the checkpoint that `source` becomes."""
    import_model(source, out, **options)
    return checkpoint.load(out).weights
