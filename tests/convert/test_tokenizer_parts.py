"""A folder without tokenizer.json: what is built of its parts divides texts as transformers does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers.tiny_huggingface import LLAMA, save
from merino_edge.convert import tokenizer_parts
from merino_edge.convert.import_model import import_model
from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import ArtefactError, MerinoError, UnsupportedError
from merino_edge.export.parity import TEXT
from merino_edge.tokenizer import Tokenizer

ADDED = {
    str(298 + i): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for i, token in enumerate(("<|begin|>", "<|stop|>"))
}
FOLDERS: dict[str, dict[str, Any]] = {
    "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": ADDED, "eos_token": "<|stop|>"},
    "gpt2": {"tokenizer_class": "GPT2Tokenizer"},
    "gpt2 with its own": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"},
}
_END = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": True, "__type": "AddedToken"}
FOLDERS["opt"] = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "pad_token": {**_END, "content": "<pad>"}}
FOLDERS["opt"] |= dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)
FOLDERS["qwen2"]["additional_special_tokens"] = ["<|begin|>", "<|stop|>"]


def _texts(count: int) -> list[str]:
    """Strings of words, digits, scripts, white space and special tokens, the same every time."""
    rng = random.Random(0)
    words = [
        "hello",
        "don't",
        "I'LL",
        "12,345",
        "x=y;",
        "naïve",
        "e\u0301",
        "日本語",
        "한국어",
        "العربية",
        "🦊",
        "Ⅷ",
        "ﬁ",
    ]
    words += ["<|begin|>", "<|stop|>", "<|im_end|>", "<|endoftext|>", "</s>", "<pad>", "__init__", "\u2019s"]
    spaces = (" ", " ", "", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000")
    own = ["".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(161, 1500)))) for _ in "abc") for _ in words]
    return [
        "".join(rng.choice([*words, *own]) + rng.choice(spaces) for _ in range(rng.randint(0, 9))) for _ in range(count)
    ]


def _folder(folder: Path, settings: dict[str, Any]) -> Path:
    model = json.loads(train_tokenizer(iter([TEXT]), 298).to_str())
    vocabulary = dict(sorted(model["model"]["vocab"].items(), key=lambda item: item[1]))
    assert len(vocabulary) == 298
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_it_divides_texts_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "folder", FOLDERS[name])
    theirs = getattr(transformers, FOLDERS[name]["tokenizer_class"]).from_pretrained(folder)
    ours = tokenizer_parts.build(folder, FOLDERS[name], {}, "gpt2")
    texts = _texts(2000)
    for special in (True, False):
        expected = theirs(texts, add_special_tokens=special)["input_ids"]
        assert [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=special)] == expected
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    assert [ours.decode(ids) for ids in expected[:200]] == theirs.batch_decode(expected[:200], skip_special_tokens=True)


def test_a_whole_folder_is_imported(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", LLAMA)
    (folder / "tokenizer.json").unlink()
    _folder(folder, FOLDERS["qwen2"])
    import_model(folder, tmp_path / "ckpt")
    ours = Tokenizer.load(tmp_path / "ckpt")
    assert ours.encode("a<|stop|>")[-1] == 299 and ours.chat.eos_token_ids[0] == 299


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, UnsupportedError, "tokenizer_class 'LlamaTokenizer' is not supported"),
        ({"add_prefix_space": True}, UnsupportedError, "add_prefix_space is not supported"),
        ({"added_tokens_decoder": {"400": ADDED["298"]}}, ArtefactError, "is not the id 400"),
    ],
)
def test_other_kinds_are_refused(change: dict[str, Any], error: type[MerinoError], says: str, tmp_path: Path) -> None:
    settings = {**FOLDERS["qwen2"], **change}
    with pytest.raises(error, match=says):
        tokenizer_parts.build(_folder(tmp_path / "folder", settings), settings, {}, "qwen2")


def test_a_folder_without_any_tokenizer_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"tokenizer.json is missing; .*save_pretrained"):
        tokenizer_parts.build(tmp_path, {}, {}, "llama")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("b c\n")
    with pytest.raises(ArtefactError, match=r"vocab.json and merges.txt do not fit"):
        tokenizer_parts.build(tmp_path, {}, {}, "gpt2")
