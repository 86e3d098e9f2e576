"""GGUF import: computes, tokenizes and chats as transformers with the same file; bad files are refused."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from helpers.smollm2 import PROMPTS, each_gguf_parsed_once
from merino_edge import checkpoint, tokenizer
from merino_edge.convert.import_model import import_model
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError
from merino_edge.presets import preset
from merino_edge.pytorch.model import Model

CONVERSATIONS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "<b>é</b>"},
    ],
)


def _load(cls: Any, file: Path, **options: Any) -> Any:
    with each_gguf_parsed_once():
        return cls.from_pretrained(file.parent, gguf_file=file.name, **options)


def test_smollm2_computes_as_transformers_does(
    smollm2_checkpoint: Path, smollm2_gguf: Path, smollm2_reference: Any
) -> None:
    loaded = checkpoint.load(smollm2_checkpoint)
    assert loaded.architecture == preset("smollm2-135m")
    assert loaded.training["source"]["files"] == {
        smollm2_gguf.name: hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest()
    }
    # In double: how far two float32 sums of one model are apart depends on the processor (0.0013 with AMX). What is
    # left is the angles of the rotation, which both compute in float32.
    ours = Model.from_weights(loaded.architecture, loaded.weights).double()
    theirs = copy.deepcopy(smollm2_reference).double()
    encode = tokenizer.Tokenizer.load(smollm2_checkpoint).encode
    assert len(PROMPTS) == 20
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(encode(p)) for p in PROMPTS], batch_first=True)
    assert tokens.shape[0] == 20  # padded at the end, which no earlier position sees
    with torch.no_grad():
        difference = ours(tokens) - theirs(tokens).logits
    assert float(difference.abs().max()) <= 1e-3


def test_smollm2_reads_and_chats_as_transformers_does(smollm2_checkpoint: Path, smollm2_gguf: Path) -> None:
    ours, theirs = tokenizer.Tokenizer.load(smollm2_checkpoint), _load(transformers.AutoTokenizer, smollm2_gguf)
    for messages in CONVERSATIONS:
        rendered = ours.apply_template(messages)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.encode(rendered) == theirs.encode(rendered, add_special_tokens=False)
    for prompt in PROMPTS:
        ids = ours.encode(prompt)
        assert ids == theirs(prompt).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == prompt
    assert ours.chat.eos_token_ids == (2, 0, 4) and ours.chat.bos_token_id is None
    assert ours.decode([1, 28120, 2]) == "hello"


def test_smollm2_splits_digits_before_words(smollm2_checkpoint: Path) -> None:
    """The ids are llama.cpp's and agree with the model's own tokenizer.json. transformers reads the file otherwise."""
    assert tokenizer.Tokenizer.load(smollm2_checkpoint).encode("a  7\n\n  12") == [81, 256, 39, 39892, 33, 34]


# --- small files -----------------------------------------------------------------------------------

WIDTH, HEADS, KV_HEADS, FFN_WIDTH, LAYERS = 32, 4, 2, 128, 2
POSITIONS = 1024  # transformers reads no other number of a GPT-2 file
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def _vocabulary() -> tuple[list[str], list[str]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        PROMPTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(pair) for pair in model["merges"]]


TOKENS, MERGES = _vocabulary()


def _write(
    path: Path, family: str = "llama", pre: str = "gpt-2", more: dict[str, Any] | None = None, extra_tensor: str = ""
) -> Path:
    """A GGUF file of random float32, float16 and Q8_0 weights, as llama.cpp's converter lays them out."""
    rng = np.random.default_rng(0)
    file = gguf.GGUFWriter(str(path), family)
    numbers = {"context_length": POSITIONS, "block_count": LAYERS, "attention.head_count": HEADS}
    numbers |= {"embedding_length": WIDTH, "feed_forward_length": FFN_WIDTH}
    if family != "gpt2":
        numbers["attention.head_count_kv"] = KV_HEADS
        file.add_float32(f"{family}.rope.freq_base", 500.0)
    for key, value in numbers.items():
        if f"{family}.{key}" not in (more or {}):
            file.add_uint32(f"{family}.{key}", value)
    file.add_float32(f"{family}.attention.layer_norm_{'' if family == 'gpt2' else 'rms_'}epsilon", 1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(TOKENS)
    file.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in TOKENS])
    file.add_token_merges(MERGES)
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    file.add_chat_template(TEMPLATE)
    for key, item in (more or {}).items():
        getattr(file, {str: "add_string", bool: "add_bool", int: "add_uint32", list: "add_array"}[type(item)])(
            key, item
        )

    def tensor(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.2)
        if name.endswith("ffn_up.weight"):
            file.add_tensor(name, values.astype(np.float16))
        elif name.endswith("ffn_down.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            file.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            file.add_tensor(name, values)

    def linear(name: str, out: int, into: int, bias: bool = family == "gpt2") -> None:
        tensor(f"{name}.weight", out, into)
        if bias:
            tensor(f"{name}.bias", out)

    def norm(name: str) -> None:
        tensor(f"{name}.weight", WIDTH)
        if family == "gpt2":
            tensor(f"{name}.bias", WIDTH)

    tensor("token_embd.weight", len(TOKENS), WIDTH)
    if family == "gpt2":
        tensor("position_embd.weight", POSITIONS, WIDTH)
    norm("output_norm")
    for layer in (f"blk.{i}." for i in range(LAYERS)):
        norm(f"{layer}attn_norm")
        norm(f"{layer}ffn_norm")
        if family == "gpt2":
            linear(f"{layer}attn_qkv", 3 * WIDTH, WIDTH)
        else:
            kv_width = WIDTH // HEADS * KV_HEADS
            for name, out in (("attn_q", WIDTH), ("attn_k", kv_width), ("attn_v", kv_width)):
                linear(layer + name, out, WIDTH, bias=family == "qwen2")
            linear(f"{layer}ffn_gate", FFN_WIDTH, WIDTH)
        linear(f"{layer}attn_output", WIDTH, WIDTH)
        linear(f"{layer}ffn_up", FFN_WIDTH, WIDTH)
        linear(f"{layer}ffn_down", WIDTH, FFN_WIDTH)
    if family == "llama":
        tensor("output.weight", len(TOKENS), WIDTH)
    if extra_tensor:
        tensor(extra_tensor, 4)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_small_models_compute_as_transformers_does(family: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "small.gguf", family)
    a = import_model(file, tmp_path / "ckpt")
    theirs = _load(transformers.AutoModelForCausalLM, file, dtype=torch.float32)
    assert a.tied_head == (family != "llama") and a.parameters == theirs.num_parameters()
    tokens = torch.randint(0, a.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = Model.from_weights(a, checkpoint.load(tmp_path / "ckpt").weights)(tokens) - theirs(tokens).logits
    assert float(difference.abs().max()) <= 1e-3


def test_beginning_of_text(tmp_path: Path) -> None:
    """BOS is prepended where the file says so or llama.cpp does by default. The template has its token in any case."""
    for pre, more, bos in (
        ("gpt-2", {}, []),
        ("llama-bpe", {}, [0]),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, [0]),
    ):
        import_model(_write(tmp_path / "small.gguf", pre=pre, more=more), tmp_path / "ckpt")
        loaded = tokenizer.Tokenizer.load(tmp_path / "ckpt")
        assert loaded.encode("a") == [*bos, TOKENS.index("a")]
        assert loaded.apply_template([{"role": "user", "content": "a"}]) == "<s>a</s>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", "Ġpay", "Ġ12345", "Ġ", "ĠEUR", "'", "S", ".", "ĊĊ", "Ġx"]),
        ("smollm", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠEUR", "'", "S", ".", "ĊĊ", "Ġx"]),
        ("llama-bpe", ["I", "'ll", "Ġpay", "Ġ", "123", "45", "Ġ", "ĠEUR", "'S", ".ĊĊ", "Ġx"]),
        ("qwen2", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠEUR", "'S", ".ĊĊ", "Ġx"]),
        ("tekken", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠEUR", "'S", ".ĊĊ", "Ġx"]),
        ("gpt-4o", ["I'll", "Ġpay", "Ġ", "123", "45", "Ġ", "ĠEUR'S", ".ĊĊ", "Ġx"]),
        ("deepseek-v3", ["I", "'ll", "Ġpay", "Ġ", "123", "45", "Ġ", "ĠEUR", "'S", ".ĊĊ", "Ġx"]),
        (
            "deepseek-coder",
            ["I", "'", "ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠEUR", "'", "S", ".", "Ċ", "Ċ", "Ġx"],
        ),
    ],
)
def test_words_of_each_kind_of_tokenizer(pre: str, pieces: list[str], tmp_path: Path) -> None:
    import_model(_write(tmp_path / "small.gguf", pre=pre), tmp_path / "ckpt")
    backend = Tokenizer.from_file(str(tmp_path / "ckpt" / "tokenizer.json"))
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("I'll pay 12345  EUR'S.\n\n x")] == pieces


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"family": "mamba"}, "architecture 'mamba'"),
        ({"pre": "viking"}, "kind 'viking'"),
        ({"more": {"llama.expert_count": 8}}, "llama.expert_count"),
        ({"more": {"llama.rope.scaling.type": "ntk"}}, "llama.rope.scaling.type ntk"),
        ({"more": {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count 4"),
        ({"extra_tensor": "rope_freqs.bias"}, "rope_freqs.bias has no place"),
        ({"extra_tensor": "blk.0.attn_q_norm.weight"}, "attn_q_norm.weight has no place"),
    ],
)
def test_what_cannot_be_spelled_is_refused_by_name(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "small.gguf", **options)
    with pytest.raises(UnsupportedError, match=word):
        import_model(file, tmp_path / "ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.gguf"]


def _refuses(data: bytes, folder: Path) -> bool:
    """Whether these bytes are refused in one line. A refusal must leave no files."""
    (folder / "damaged.gguf").write_bytes(data)
    refusal = None
    try:
        import_model(folder / "damaged.gguf", folder / "ckpt")
    except MerinoError as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal) and refusal.hint
        assert not list(folder.glob("*ckpt*"))
    return refusal is not None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _write(tmp_path_factory.mktemp("small") / "small.gguf").read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_file_is_refused(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    length = data.draw(st.integers(0, len(small) - 64))  # the end is padding
    assert _refuses(small[:length], tmp_path_factory.mktemp("truncated"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_the_header_escapes(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A flipped bit gives another valid model or a refusal, and nothing else."""
    damaged = bytearray(small)
    damaged[data.draw(st.integers(0, small.index(b"token_embd") + 2000))] ^= 1 << data.draw(st.integers(0, 7))
    _refuses(bytes(damaged), tmp_path_factory.mktemp("flipped"))


def test_endless_arrays_and_strings_are_refused(small: bytes, tmp_path: Path) -> None:
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges"):
        start = small.index(key) + len(key) + 8  # after the value's type and the elements' type
        assert _refuses(small[:start] + (2**62).to_bytes(8, "little") + small[start + 8 :], tmp_path)


def test_a_token_without_embedding_is_refused(tmp_path: Path) -> None:
    for token_id in (len(TOKENS), 2**31):
        file = _write(tmp_path / "small.gguf", more={"tokenizer.ggml.eot_token_id": token_id})
        with pytest.raises(ArtefactError, match=r"no embedding|eot_token_id"):
            import_model(file, tmp_path / "ckpt")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not a GGUF file"):
        import_model(tmp_path / "a.gguf", tmp_path / "ckpt")
    with pytest.raises(ArtefactError, match="does not exist"):
        import_model(tmp_path / "models/b.gguf", tmp_path / "ckpt")


def test_counts_may_be_spelled_for_each_layer(tmp_path: Path) -> None:
    """Some files have a list of equal numbers. Numbers that differ are refused, and by name."""
    import_model(_write(tmp_path / "small.gguf"), tmp_path / "want")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        once = {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "feed_forward_length": FFN_WIDTH}[
            key
        ]
        a = import_model(_write(tmp_path / "listed.gguf", more={f"llama.{key}": [once] * LAYERS}), tmp_path / "ckpt")
        assert a == checkpoint.load(tmp_path / "want").architecture
        with pytest.raises(UnsupportedError, match=f"llama.{key} differs from layer to layer"):
            import_model(_write(tmp_path / "listed.gguf", more={f"llama.{key}": [once, once * 2]}), tmp_path / "ckpt")
