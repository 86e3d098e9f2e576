"""Every family of GGUF computes as its origin in transformers, and goes out again as the same family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.tiny_families import VOCAB
from helpers.tiny_gguf import MODELS, tiny_model, write
from merino_edge import checkpoint
from merino_edge.convert import gguf_families
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.errors import UnsupportedError
from merino_edge.pytorch.model import Model

TOLERANCE = 1e-4  # of the largest logit


def test_every_family_has_a_model_here() -> None:
    older = {"gpt2"}  # tests/convert/test_gguf.py has its model
    assert {family for family, _ in MODELS.values()} | older == gguf_families.FAMILIES.keys()


@torch.no_grad()
def _logits(path: Path, tokens: torch.Tensor) -> Any:
    loaded = checkpoint.load(path)
    return Model.from_weights(loaded.architecture, loaded.weights).eval()(tokens).numpy()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_file_computes_as_its_origin_and_comes_back(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    a = import_model(write(name, model, tmp_path / "theirs.gguf"), tmp_path / "ckpt")
    tokens = torch.randint(0, VOCAB, (1, a.max_positions), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits.numpy()
    got = _logits(tmp_path / "ckpt", tokens)
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
    loaded = checkpoint.load(tmp_path / "ckpt")
    if a.rotary_factors and len(set(a.rotary_factors)) > 1 and not gguf_families.FAMILIES[MODELS[name][0]].factors:
        with pytest.raises(UnsupportedError, match="no family of GGUF has rotary_factors"):  # yarn
            export_to_gguf(tmp_path / "ckpt", tmp_path / "ours.gguf", "fp32")
        return
    written = export_to_gguf(tmp_path / "ckpt", tmp_path / "ours.gguf", "fp32")
    assert written.family == MODELS[name][0]
    assert import_model(tmp_path / "ours.gguf", tmp_path / "again").id == a.id
    again = checkpoint.load(tmp_path / "again").weights
    for part, weight in loaded.weights.items():
        np.testing.assert_allclose(again[part], weight, rtol=1e-6, atol=1e-7)


def test_a_window_that_llama_cpp_leaves_out_is_read_and_not_written(tmp_path: Path) -> None:
    """llama.cpp runs Phi-3 without its window; the model itself has one."""
    model = tiny_model("phi3", sliding_window=9)
    a = import_model(write("phi3", model, tmp_path / "theirs.gguf"), tmp_path / "ckpt")
    assert [block.window for block in a.blocks] == [9]
    with pytest.raises(UnsupportedError, match="no family of GGUF has window 9"):
        export_to_gguf(tmp_path / "ckpt", tmp_path / "ours.gguf", "fp32")
