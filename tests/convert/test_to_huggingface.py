"""Hugging Face export: transformers computes, tokenizes and chats as we do, and an import gives the same back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.random_model import random_model
from helpers.warm_python import warm_merino
from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.convert.end_tokens import end_token_ids
from merino_edge.convert.families import FAMILIES
from merino_edge.convert.import_model import import_model
from merino_edge.convert.imported import bind_template
from merino_edge.convert.to_huggingface import export_to_huggingface
from merino_edge.data.bpe import END_OF_TEXT, END_OF_TEXT_ID, chat_format, train_tokenizer
from merino_edge.errors import OutputError, UnsupportedError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import ChatFormat, Tokenizer

# Both compute in float32, in other orders of summation: 1e-6 of the largest logit at most, and 3e-6 in SmolLM2.
TOLERANCE = 1e-4  # of the largest logit; a norm of four channels that lie close together enlarges rounding to 2e-5
TEXT = "Hello world, 1984! naïve 日本語 \n\n  def f(x):\n\treturn x"
BACKEND = train_tokenizer(iter([TEXT * 9]), 300)
OPT = Architecture(320, 24, 32, 8, (Block(32, 2, 4, 4, 48),), position_offset=2)
GPT2 = dataclasses.replace(OPT, position_offset=0, ffn="gelu_tanh", norm_epsilon=1e-3)
NEOX = dataclasses.replace(
    GPT2, positions="rotary", rotary_dim=2, rotary_base=500.0, ffn="gelu", parallel_residual=True, tied_head=False
)
LLAMA = Architecture(
    320, 24, 32, 8, (Block(32, 2, 4, 2, 48),), norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=8,
    rotary_base=500.0, bias="none", norm_epsilon=1e-3,
)  # fmt: skip
SPELLED = {
    "opt": OPT,
    "opt, post norm, narrow embedding": dataclasses.replace(OPT, embedding_width=16, norm_placement="post"),
    "opt, no bias, own head, gelu": dataclasses.replace(OPT, bias="none", tied_head=False, ffn="gelu"),
    "gpt2": GPT2,
    "gpt2, relu, own head": dataclasses.replace(GPT2, ffn="relu", tied_head=False),
    "gpt_neox": NEOX,
    "gpt_neox, one after the other, tied": dataclasses.replace(NEOX, parallel_residual=False, tied_head=True),
    "gpt_neox, 30 of 44 dimensions rotated": dataclasses.replace(
        NEOX, head_dim=44, rotary_dim=30, embedding_width=88, blocks=(Block(88, 1, 2, 2, 48),)
    ),
    "llama": LLAMA,
    "llama, own head, biased": dataclasses.replace(LLAMA, tied_head=False, bias="all"),
    "llama, all heads": dataclasses.replace(LLAMA, blocks=(Block(32, 1, 4, 4, 40),)),
    "qwen2": dataclasses.replace(LLAMA, bias="qkv"),
}


def _checkpoint(path: Path, a: Architecture, chat: ChatFormat | None = None, dtype: Any = np.float32) -> Path:
    weights = {name: array.astype(dtype) for name, array in random_model(a).items()}
    checkpoint.save(
        path,
        a,
        weights,
        tokenizer_json=str(BACKEND.to_str()),
        chat=chat or chat_format(),
        training={"source": "random"},
    )
    return path


def _same_logits(folder: Path, ckpt: Path) -> Any:
    """Assert that transformers' model in `folder` equals the checkpoint's, and return it."""
    loaded = checkpoint.load(ckpt)
    a = loaded.architecture
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report  # no weight missing, none without a place
    tokens = torch.randint(0, a.vocab_size, (2, a.max_positions), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = model.eval()(tokens).logits, Model.from_weights(a, loaded.weights)(tokens)
    assert float((theirs - ours).abs().max()) <= TOLERANCE * float(ours.abs().max())
    return model


def _with_named_ends(chat: ChatFormat) -> ChatFormat:
    """The tokenizer's <|endoftext|> and <|im_end|> end answers after an import, whatever the chat format said."""
    return dataclasses.replace(chat, eos_token_ids=end_token_ids(chat.eos_token_ids, BACKEND.get_vocab()))


def _comes_back(folder: Path, ckpt: Path, back: Path) -> None:
    """Assert that importing `folder` gives the same checkpoint, except that shared layers are copied."""
    import_model(folder, back)
    before, after = checkpoint.load(ckpt), checkpoint.load(back)
    assert after.architecture == before.architecture and after.chat == _with_named_ends(before.chat)
    assert after.weights.keys() == before.weights.keys()
    for name, array in before.weights.items():
        assert after.weights[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", SPELLED)
def test_logits_equal_and_weights_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    ckpt = _checkpoint(tmp_path / "ckpt", SPELLED[name])
    written = export_to_huggingface(ckpt, tmp_path / "hf")
    assert written.family == name.split(",")[0] and written.copied_layers == 0
    model = _same_logits(tmp_path / "hf", ckpt)
    assert type(model).__name__ == written.model
    assert model.num_parameters() == SPELLED[name].parameters
    _comes_back(tmp_path / "hf", ckpt, tmp_path / "back")


def test_every_family_of_the_import_is_written_as_what_it_was(tmp_path: Path) -> None:
    """Mistral without a window computes as Llama, and stays Mistral. test_every_family.py has the later families."""
    assert {written.split(",")[0] for written in SPELLED} < FAMILIES.keys()
    ckpt = _checkpoint(tmp_path / "ckpt", LLAMA)
    source = checkpoint.load(ckpt)
    told = {"source": {"format": "huggingface", "family": "mistral"}}
    checkpoint.save(ckpt, LLAMA, source.weights, tokenizer_json=str(BACKEND.to_str()), chat=source.chat, training=told)
    assert export_to_huggingface(ckpt, tmp_path / "hf").model == "MistralForCausalLM"
    _same_logits(tmp_path / "hf", ckpt)
    _comes_back(tmp_path / "hf", ckpt, tmp_path / "back")


def test_layers_that_share_weights_get_copies(tmp_path: Path) -> None:
    one = Block(32, 3, 4, 2, 48, shared=True)
    a = dataclasses.replace(LLAMA, blocks=(one, dataclasses.replace(one, layers=2, shared=False), one))
    ckpt = _checkpoint(tmp_path / "ckpt", a)
    written = export_to_huggingface(ckpt, tmp_path / "hf")
    assert written.copied_layers == 4 and written.architecture.layers == 8
    _same_logits(tmp_path / "hf", ckpt)
    import_model(tmp_path / "hf", tmp_path / "back")
    assert checkpoint.load(tmp_path / "back").architecture == written.architecture


def test_half_precision_stays_half(tmp_path: Path) -> None:
    ckpt = _checkpoint(tmp_path / "ckpt", LLAMA, dtype=np.float16)
    export_to_huggingface(ckpt, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    assert _same_logits(tmp_path / "hf", ckpt).dtype == torch.float32  # as asked for there
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.float16


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Random sizes of every family, sometimes with a trait of another family, which mostly no family has."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    a = SPELLED[draw(st.sampled_from(sorted(SPELLED)))]
    head_dim, heads = pick(4, 8, 12), pick(1, 2, 4)
    grouped = a.blocks[0].kv_heads < a.blocks[0].heads
    block = Block(
        heads * head_dim, pick(1, 2, 3), heads, 1 if grouped else heads, pick(16, 40), shared=bool(pick(0, 1))
    )
    sizes: dict[str, Any] = {
        "vocab_size": BACKEND.get_vocab_size() + pick(0, 7),
        "max_positions": pick(5, 16),
        "head_dim": head_dim,
        "blocks": pick((block,), (block, block)),
        "embedding_width": 20 if a.embedding_width < a.blocks[0].width else block.width,
        "rotary_dim": 0 if a.positions == "learned" else head_dim if a.gated else pick(2, head_dim),
        "rotary_base": pick(1e4, 123.0),
        "norm_epsilon": 1e-5 if a.position_offset else pick(1e-5, 1e-3),
        "tied_head": draw(st.booleans()),
    }
    other: Any = (
        {"bias": "qkv"},
        {"ffn": "gelu"},
        {"norm": "rmsnorm"},
        {"blocks": (block, dataclasses.replace(block, ffn_width=9))},
    )
    return dataclasses.replace(a, **{**sizes, **pick({}, {}, {}, *other)})


@settings(max_examples=40, deadline=None)
@given(a=architectures())
def test_any_architecture_computes_the_same_or_is_refused(a: Architecture) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ckpt, out = _checkpoint(Path(folder) / "ckpt", a), Path(folder) / "hf"
        try:
            export_to_huggingface(ckpt, out)
        except UnsupportedError:
            assert [path.name for path in Path(folder).iterdir()] == ["ckpt"]
            return
        _same_logits(out, ckpt)


# --- tokenizer and chat ----------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\n"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TOKENS = {"bos_token": "<|im_start|>", "eos_token": '<|"im_end|>', "unk_token": "?", "image_token": "<|img|>"}
BOUND = bind_template(TEMPLATE + "{{ unk_token }}{{ image_token }}{{ sep_token is defined }}", "test", **TOKENS)
CHATS = {
    "trained here": chat_format(),
    "no template": ChatFormat((END_OF_TEXT_ID,)),
    "no special token": ChatFormat(),
    "begins with a token": ChatFormat((2,), 1, TEMPLATE),
    "several ends": ChatFormat((2, 0, 1), None, TEMPLATE),
    "tokens of the template's own": ChatFormat((2,), None, BOUND),
}


@pytest.mark.parametrize("name", CHATS)
def test_prompts_and_ends_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    chat = CHATS[name]
    ckpt = _checkpoint(tmp_path / "ckpt", LLAMA, chat)
    export_to_huggingface(ckpt, tmp_path / "hf")
    ours, theirs = Tokenizer.load(ckpt), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, "", f"a{END_OF_TEXT}b<|im_start|>", " 12 \n"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    if chat.chat_template is not None:
        prompt = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert ours.apply_template(MESSAGES) == prompt
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ends = model.generation_config.eos_token_id
    assert chat.eos_token_ids == tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])
    assert model.generation_config.bos_token_id == chat.bos_token_id
    import_model(tmp_path / "hf", tmp_path / "back")
    back = checkpoint.load(tmp_path / "back").chat
    assert (back.eos_token_ids, back.bos_token_id) == (_with_named_ends(chat).eos_token_ids, chat.bos_token_id)
    if chat.chat_template is not None:
        assert Tokenizer.load(tmp_path / "back").apply_template(MESSAGES) == ours.apply_template(MESSAGES)
    assert name != "tokens of the template's own" or back == _with_named_ends(chat)


def test_a_tokenizer_that_prepends_what_the_chat_does_not_is_mended(tmp_path: Path) -> None:
    """A checkpoint's own tokenizer never prepends BOS. transformers follows tokenizer.json."""
    with_bos, without = tmp_path / "with", tmp_path / "without"
    export_to_huggingface(_checkpoint(tmp_path / "ckpt", LLAMA, ChatFormat((2,), 1)), with_bos)
    before = checkpoint.load(tmp_path / "ckpt")
    prepending = (with_bos / "tokenizer.json").read_text()
    checkpoint.save(
        tmp_path / "ckpt", LLAMA, before.weights, tokenizer_json=prepending, chat=ChatFormat((2,)), training={}
    )
    export_to_huggingface(tmp_path / "ckpt", without)
    firsts = [transformers.AutoTokenizer.from_pretrained(folder)("12").input_ids[0] for folder in (with_bos, without)]
    assert firsts[0] == 1 and firsts[1] != 1
    assert transformers.AutoTokenizer.from_pretrained(without)("12").input_ids == BACKEND.encode("12").ids


# --- refusals and the command ----------------------------------------------------------------------


def _blocks(*blocks: Block) -> Architecture:
    return dataclasses.replace(LLAMA, blocks=blocks)


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (
            _blocks(Block(32, 1, 4, 2, 48), Block(32, 1, 4, 2, 64)),
            r"ffn_width is 48 in blocks\[0\] and 64 in blocks\[1",
        ),
        (_blocks(Block(32, 1, 4, 2, 48), Block(64, 1, 8, 4, 48)), r"width is 32 in blocks\[0\] and 64"),
        (_blocks(Block(32, 1, 4, 2, 48), Block(32, 1, 4, 4, 48)), "kv_heads is 2"),
        (dataclasses.replace(LLAMA, embedding_width=16), "has embedding_width 16; the nearest, llama, .* 32"),
        (
            dataclasses.replace(LLAMA, rotary_dim=4, bias="all"),
            "has rotary_dim 4; the nearest, llama, has rotary_dim 8",
        ),
        (dataclasses.replace(LLAMA, ffn="relu"), "has ffn relu; the nearest, llama, has ffn swiglu"),
        (dataclasses.replace(NEOX, embedding_width=16), "has embedding_width 16; the nearest, gpt_neox"),
        (dataclasses.replace(OPT, position_offset=1), "has position_offset 1; the nearest"),
        (dataclasses.replace(OPT, bias="qkv"), "has bias qkv; the nearest, opt"),
    ],
)
def test_what_no_family_says_is_refused_by_name(a: Architecture, expected: str, tmp_path: Path) -> None:
    ckpt = _checkpoint(tmp_path / "ckpt", a)
    with pytest.raises(UnsupportedError, match=expected) as refusal:
        export_to_huggingface(ckpt, tmp_path / "hf")
    assert f"merino-edge export {ckpt} --out BUNDLE" in refusal.value.hint and "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    ckpt = _checkpoint(tmp_path / "ckpt", LLAMA)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("precious")
    with pytest.raises(OutputError, match="not an artefact"):
        export_to_huggingface(ckpt, tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_command_line(tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [warm_merino(), "export-hf", str(tmp_path / "ckpt"), "--out", *more]
        return subprocess.run(command, capture_output=True, text=True)

    _checkpoint(tmp_path / "ckpt", _blocks(Block(32, 3, 4, 2, 48, shared=True)))
    done = run(str(tmp_path / "hf"), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["model"] == "LlamaForCausalLM" and told["copied_layers"] == 2
    assert "2 of 3 layers are copies" in done.stderr
    _checkpoint(tmp_path / "ckpt", dataclasses.replace(LLAMA, embedding_width=16))
    refused = run(str(tmp_path / "other"))
    assert refused.returncode == UnsupportedError.exit_code and not refused.stdout
    assert refused.stderr.count("\n") == 1 and "embedding_width" in refused.stderr
