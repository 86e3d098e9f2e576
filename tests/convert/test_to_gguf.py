"""GGUF out: reading the file back gives the checkpoint, and what llama.cpp cannot have is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as decoding

from helpers.random_model import random_model
from helpers.tiny_huggingface import GPT2, LLAMA
from helpers.warm_python import warm_merino
from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block, Rotary
from merino_edge.convert import gguf_tokenizer
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.errors import OutputError, UnsupportedError
from merino_edge.export.parity import TEXT
from merino_edge.tokenizer import ChatFormat
from merino_edge.tokenizer import Tokenizer as OurTokenizer

QWEN2 = dataclasses.replace(LLAMA, bias="qkv", tied_head=True, rotary_base=500.0)
SHARED = dataclasses.replace(LLAMA, blocks=(Block(32, 3, 2, 1, 64, shared=True),))
TWO_WIDTHS = (Block(32, 1, 2, 1, 48), Block(32, 1, 2, 1, 64))
WIDE = dataclasses.replace(LLAMA, blocks=(Block(32, 2, 4, 2, 64),), tied_head=True)  # heads wider than the stream
FACTORS = tuple(1.0 + i / 2 for i in range(8))


def _kinds(*kinds: tuple[int, int, Rotary]) -> tuple[Block, ...]:
    """Blocks of so many layers, with a window and a rotary."""
    return tuple(Block(32, layers, 2, 1, 48, window=window, rotary=rotary) for layers, window, rotary in kinds)


GEMMA = dataclasses.replace(LLAMA, ffn="geglu_tanh", tied_head=True)
GEMMA2 = dataclasses.replace(GEMMA, norm_placement="both", attention_cap=50.0, logit_cap=30.0)
GEMMA3 = dataclasses.replace(GEMMA, norm_placement="both", qk_norm="head", rotary_base=1e6, local_rotary_base=1e4)
SHAPES = {
    "llama": dataclasses.replace(LLAMA, rotary_base=500000.0, rotary_factors=FACTORS),
    "qwen2": QWEN2,
    "qwen3": dataclasses.replace(WIDE, qk_norm="head"),
    "smollm3": dataclasses.replace(LLAMA, blocks=_kinds((3, 0, "global"), (1, 0, "none"))),
    "gemma": GEMMA,
    "gemma2": dataclasses.replace(GEMMA2, blocks=_kinds((1, 16, "global"), (1, 0, "global"), (1, 16, "global"))),
    "gemma3": dataclasses.replace(GEMMA3, blocks=_kinds((5, 16, "local"), (1, 0, "global"), (1, 16, "local"))),
    "olmo2": dataclasses.replace(LLAMA, norm_placement="after", qk_norm="width"),
    "gpt2": GPT2,
}


def _save(
    path: Path, a: Architecture, backend: Tokenizer | None = None, chat: ChatFormat | None = None
) -> dict[str, np.ndarray]:
    backend = backend or train_tokenizer(iter([TEXT]), a.vocab_size - 20)
    weights = random_model(a)
    checkpoint.save(
        path, a, weights, tokenizer_json=backend.to_str(), chat=chat or chat_format(), training={"source": "random"}
    )
    return weights


@pytest.mark.parametrize("family", SHAPES)
def test_reading_it_back_gives_the_checkpoint(family: str, tmp_path: Path) -> None:
    a = SHAPES[family]
    weights = _save(tmp_path / "ckpt", a, chat=ChatFormat((0, 2), None, "{{ messages[0].content }}"))
    written = export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf", "fp32")
    assert written.family == family and written.size_bytes == (tmp_path / "m.gguf").stat().st_size
    assert import_model(tmp_path / "m.gguf", tmp_path / "back") == a
    back = checkpoint.load(tmp_path / "back")
    assert back.weights.keys() == weights.keys()
    for name, value in weights.items():  # Gemma's embedding is scaled and scaled back
        np.testing.assert_allclose(back.weights[name], value, rtol=3e-7 if family.startswith("gemma") else 0)
    assert back.chat.eos_token_ids[:2] == (0, 2) and back.chat.bos_token_id is None
    assert back.chat.chat_template == "{{ messages[0].content }}"
    ours, theirs = OurTokenizer.load(tmp_path / "ckpt"), OurTokenizer.load(tmp_path / "back")
    for text in (TEXT[:300], " 3.14\n\n  don't <|endoftext|>x", "日本語 é"):
        assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2**-11), ("int8", 1 / 127), ("int4", 1 / 15)])
def test_other_precisions_are_as_near_as_they_can_be(precision: str, bound: float, tmp_path: Path) -> None:
    weights = _save(tmp_path / "ckpt", SHARED)
    written = export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf", precision)
    assert written.copied_layers == 2 and not written.at_fp16
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    back = checkpoint.load(tmp_path / "back").weights
    for layer in range(3):
        for name in ("attention.query.weight", "ffn.down.weight"):
            want, got = weights[f"blocks.0.layers.0.{name}"], back[f"blocks.0.layers.{layer}.{name}"]
            largest = np.abs(want).max()  # of a block of 32 it is no larger
            assert 0 < np.abs(want - got).max() <= bound * largest
    np.testing.assert_array_equal(back["final_norm.weight"], weights["final_norm.weight"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {"fp16": "F16", "int8": "Q8_0", "int4": "Q8_0"}[precision]
    assert kinds["blk.0.ffn_up.weight"] == {"fp16": "F16", "int8": "Q8_0", "int4": "Q4_1"}[precision]


def test_matrices_without_whole_blocks_stay_float16(tmp_path: Path) -> None:
    _save(tmp_path / "ckpt", dataclasses.replace(LLAMA, blocks=(Block(32, 1, 2, 1, 40),)))
    written = export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf", "int8")
    assert written.at_fp16 == ("blk.0.ffn_down.weight",)


# --- tokenizers ------------------------------------------------------------------------------------


def _spm(prefix: bool) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab", "▁▁"]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": b"llama",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-7, -8, -9, -2, -1, -3, -4], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 7, np.int32),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return gguf_tokenizer.build(Metadata(values, "test"))


def _unigram() -> Tokenizer:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -1.5), ("ab", -2.0), ("▁", -3.0)]
    backend = Tokenizer(models.Unigram([*vocabulary, ("a", -4.0)], 2, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoding.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return backend


def _byte_level(kind: str) -> Tokenizer:
    backend = train_tokenizer(iter([TEXT]), 300)
    normalizer, backend.pre_tokenizer = gguf_tokenizer.steps(gguf_tokenizer.KINDS[kind])
    if normalizer is not None:
        backend.normalizer = normalizer
    if gguf_tokenizer.KINDS[kind].whole_words:
        document = json.loads(backend.to_str())
        document["model"]["ignore_merges"] = True
        backend = Tokenizer.from_str(json.dumps(document))
    return backend


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {kind: partial(_byte_level, kind) for kind in gguf_tokenizer.KINDS}
TOKENIZERS |= {"spm": partial(_spm, True), "spm-without-prefix": partial(_spm, False), "unigram": _unigram}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_each_kind_of_tokenizer_comes_back(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    backend = make()
    _save(tmp_path / "ckpt", LLAMA, backend, ChatFormat((2,), 1, None))
    export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf")
    import_model(tmp_path / "m.gguf", tmp_path / "back")
    ours, theirs = OurTokenizer.load(tmp_path / "ckpt"), OurTokenizer.load(tmp_path / "back")
    for text in ("ab  a b\nAb 1234 don't I'LL e\u0301 狐!", "", "  a", "abab ba", "a\u3000b\r\n\r\n x"):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.chat.bos_token_id == 1 and theirs.chat.eos_token_ids[0] == 2


# --- refusals --------------------------------------------------------------------------------------


def _odd_tokenizer(path: Path) -> None:
    backend = train_tokenizer(iter([TEXT]), 300)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), backend.pre_tokenizer])
    backend.post_processor = processors.ByteLevel()
    _save(path, LLAMA, backend)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda path: _save(path, dataclasses.replace(LLAMA, ffn="gelu")),
            "no family of GGUF has .*; the nearest, .*, has .*; run it as a bundle",
        ),
        (lambda path: _save(path, dataclasses.replace(GPT2, position_offset=2)), "position_offset 2"),
        (  # llama.cpp loads no such tensors of this family
            lambda path: _save(path, dataclasses.replace(SHAPES["olmo2"], tied_head=True)),
            "has tied_head True; the nearest, olmo2, has tied_head False",
        ),
        (
            lambda path: _save(path, dataclasses.replace(SHAPES["olmo2"], blocks=(Block(32, 2, 4, 2, 64),))),
            "has head_dim 16; the nearest, olmo2, has head_dim 8",
        ),
        (
            lambda path: _save(path, dataclasses.replace(LLAMA, blocks=TWO_WIDTHS)),
            "ffn_width is 48 in blocks",
        ),
        (_odd_tokenizer, "no tokenizer of llama.cpp divides a text as this model's does; .*export-hf"),
    ],
)
def test_what_llama_cpp_cannot_have_is_refused(make: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    make(tmp_path / "ckpt")
    with pytest.raises(UnsupportedError, match=says):
        export_to_gguf(tmp_path / "ckpt", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_file_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    _save(tmp_path / "ckpt", LLAMA)
    (tmp_path / "theirs.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(OutputError, match="not an artefact of merino-edge"):
        export_to_gguf(tmp_path / "ckpt", tmp_path / "theirs.gguf")
    export_to_gguf(tmp_path / "ckpt", tmp_path / "ours.gguf")
    first = (tmp_path / "ours.gguf").read_bytes()
    export_to_gguf(tmp_path / "ckpt", tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == first


def test_command_line(tmp_path: Path) -> None:
    _save(tmp_path / "ckpt", LLAMA)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [warm_merino(), "export", str(tmp_path / "ckpt"), "--target", "gguf", *more]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--out", str(tmp_path / "m.gguf"), "--precision", "int8", "--json")
    assert done.returncode == 0, done.stderr
    size_mb = round((tmp_path / "m.gguf").stat().st_size / 1e6, 3)
    assert json.loads(done.stdout) == {
        **{"out": str(tmp_path / "m.gguf"), "family": "llama", "precision": "int8", "size_mb": size_mb},
        "at_fp16": ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"],
    }
    for more, says in (
        (["--out", str(tmp_path / "m")], "does not end in .gguf"),
        (["--out", str(tmp_path / "n.gguf"), "--fast"], "--fast is for bundles, not for GGUF"),
        (["--out", str(tmp_path / "n.gguf"), "--precision", "int3"], "no precision 'int3'"),
    ):
        refused = run(*more)
        assert refused.returncode and says in refused.stderr and refused.stderr.count("\n") == 1
