"""Small GGUF files that would take all memory, hours, or the process: each is refused in one line, at once."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert.test_to_gguf import LLAMA, _save

from merino_edge.convert import gguf_families, gguf_tokenizer
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import ArtefactError, MerinoError, UnsupportedError
from merino_edge.tokenizer import ChatFormat

SHAPE = {"context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 64}
SHAPE |= {"attention.head_count": 2, "attention.head_count_kv": 2}


def _model(family: str, **more: Any) -> Metadata:
    fields = {**SHAPE, "attention.layer_norm_rms_epsilon": 1e-5, **more}
    values: dict[str, Any] = {f"{family}.{name}": value for name, value in fields.items()}
    return Metadata({**values, "tokenizer.ggml.tokens": [b"a", b"b"]}, "m.gguf")


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("key", ["rope.dimension_count", "attention.key_length"])
def test_a_head_of_billions_takes_no_memory(family: str, key: str) -> None:
    wide = {key: 2**32 - 2} | ({"attention.value_length": 2**32 - 2} if "key" in key else {})
    tracemalloc.start()
    with pytest.raises(UnsupportedError, match="4294967294"):
        gguf_families.read(_model(family, **wide), family, ["output.weight"])
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["logit_scale", "embedding_scale", "rope.freq_base"])
def test_numbers_that_are_not_finite_are_refused_by_their_key(name: str, value: float) -> None:
    with pytest.raises(ArtefactError, match=rf"granite\.{name} is {value}"):
        gguf_families.read(_model("granite", **{name: value}), "granite", ["output.weight"])


def _vocabulary(tokens: list[str], model: bytes = b"llama", **more: Any) -> Metadata:
    values = {"model": model, "tokens": [token.encode() for token in tokens], **more}
    values.setdefault("scores", np.zeros(len(tokens), np.float32))
    return Metadata({f"tokenizer.ggml.{name}": value for name, value in values.items()}, "m.gguf")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (_vocabulary(["<unk>", "x" * 200_000]), "a token of 200000 characters"),
        (
            _vocabulary(["<unk>", *(f"{i}{'y' * 16_000}" for i in range(20))]),
            "so long that joining takes 5e\\+09 steps",
        ),
        (_vocabulary(["<unk>", "a"], token_type=[b"x", b"y"]), "lists do not fit together"),
        *(
            (_vocabulary(["<unk>", "a"], b"t5", precompiled_charsmap=np.frombuffer(data, np.uint8)), says)
            for data, says in (
                (struct.pack("<I", 2**32 - 4) + bytes(8), "its precompiled map is cut off"),
                (struct.pack("<I", 0) + b"x" * 200, "its precompiled map puts in 200 bytes"),
            )
        ),
    ],
)
def test_vocabularies_that_would_take_for_ever_are_refused_at_once(metadata: Metadata, says: str) -> None:
    with pytest.raises(MerinoError, match=says) as refused:
        gguf_tokenizer.build(metadata)
    assert "\n" not in str(refused.value)


# --- the writer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "size"), [("fp16", 7e4), ("int8", 1e7), ("int4", 7e4)])
def test_weights_beyond_float16_are_not_written_as_infinity(precision: str, size: float, tmp_path: Path) -> None:
    from merino_edge import checkpoint

    _save(tmp_path / "ckpt", LLAMA)
    loaded = checkpoint.load(tmp_path / "ckpt")
    weights = {**loaded.weights}
    weights["blocks.0.layers.0.ffn.up.weight"] = np.full_like(weights["blocks.0.layers.0.ffn.up.weight"], size)
    text = (tmp_path / "ckpt" / "tokenizer.json").read_text()
    checkpoint.save(tmp_path / "ckpt", LLAMA, weights, tokenizer_json=text, chat=loaded.chat, training={})
    with pytest.raises(ArtefactError, match=r"blk.0.ffn_up.weight holds numbers beyond float16; export .* fp32"):
        export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf", precision)
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    small = dataclasses.replace(LLAMA, vocab_size=200)
    _save(tmp_path / "ckpt", small, train_tokenizer(iter(["a few words"] * 5), 300), ChatFormat((2,)))
    with pytest.raises(ArtefactError, match="has no embedding, the model knows 200 tokens"):
        export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf")


def test_a_token_named_as_a_filler_and_a_third_end_token_come_back(tmp_path: Path) -> None:
    from merino_edge import checkpoint
    from merino_edge.convert.import_model import import_model

    backend = train_tokenizer(iter(["a few words"] * 5), LLAMA.vocab_size - 20)
    backend.add_tokens([f"[PAD{LLAMA.vocab_size - 1}]"])
    _save(tmp_path / "ckpt", LLAMA, backend, ChatFormat((5, 6, 7)))
    export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf")
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    assert checkpoint.load(tmp_path / "back").chat.eos_token_ids[:3] == (5, 6, 7)
