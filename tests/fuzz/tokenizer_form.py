"""The form of a `tokenizer.json`: its parts exchanged for others that the library knows, harmless and harmful."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from fuzz import json_changes
from fuzz.draft import Codec

_REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
_SPLIT = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
NORMALIZERS: tuple[Any, ...] = (
    *({"type": name} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
     "lowercase": True},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "▁"},
    _REPLACE,
    {"type": "Replace", "pattern": {"Regex": "(.*)*"}, "content": "b"},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "xxxxxxxx"},
    {"type": "Sequence", "normalizers": [_REPLACE] * 3},
    {"type": "Sequence", "normalizers": [_REPLACE] * 12},
    {"type": "Sequence", "normalizers": []},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAAAAAA"},
)  # fmt: skip
PRE_TOKENIZERS: tuple[Any, ...] = (
    *({"type": name} for name in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "first", "split": False},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "Digits", "individual_digits": True},
    {"type": "FixedLength", "length": 0},
    _SPLIT,
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
    {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, _SPLIT] * 20},
)
POST_PROCESSORS: tuple[Any, ...] = (
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    {"type": "BertProcessing", "sep": ["a", 5], "cls": ["b", 2**31]},
    {"type": "RobertaProcessing", "sep": ["a", 5], "cls": ["b", 7], "trim_offsets": True, "add_prefix_space": True},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50,
     "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {"x": {"id": "x", "ids": [1, 2, 2**32 - 1], "tokens": ["a"]}}},
    {"type": "Sequence", "processors": []},
)  # fmt: skip
DECODERS: tuple[Any, ...] = (
    *({"type": name} for name in ("ByteFallback", "Fuse")),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
    {"type": "Strip", "content": "a", "start": 1, "stop": 9},
    {"type": "Replace", "pattern": {"Regex": "(.*)*"}, "content": "b" * 1000},
    {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}] * 12},
)
PADDING: tuple[Any, ...] = tuple(
    {"strategy": strategy, "direction": "Right", "pad_to_multiple_of": multiple, "pad_id": 0, "pad_type_id": 0,
     "pad_token": "x"}
    for strategy in ("BatchLongest", {"Fixed": 10**10}, {"Fixed": 7}, {"Fixed": 2**63})
    for multiple in (None, 0, 8, 10**12)
)  # fmt: skip
TRUNCATION: tuple[Any, ...] = tuple(
    {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}
    for length in (0, 3, 2**63)
    for stride in (0, 2, 3, 2**40)
)
MODELS: tuple[Any, ...] = (
    {"type": "WordLevel", "vocab": {"a": 0, "b": 5}, "unk_token": "a"},
    {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
    {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
     "vocab": {"a": 0, "##b": 1}},
    {"type": "WordPiece", "unk_token": "none", "continuing_subword_prefix": "", "max_input_chars_per_word": 0,
     "vocab": {"a": 0}},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.5]], "byte_fallback": False},
    {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": True},
    {"type": "Unigram", "unk_id": None, "vocab": [["", 1e308]], "byte_fallback": False},
    {"type": "BPE", "dropout": 0.5, "unk_token": "z", "continuing_subword_prefix": "", "end_of_word_suffix": "</w>",
     "fuse_unk": True, "byte_fallback": True, "ignore_merges": True, "vocab": {"a": 0, "b": 1, "ab": 2},
     "merges": [["a", "b"]]},
)  # fmt: skip
ADDED: tuple[Any, ...] = tuple(
    [{"id": number, "content": content, "single_word": word, "lstrip": strip, "rstrip": strip, "normalized": word,
      "special": special}]
    for number in (0, 3, 263, 264, 10**6, 2**32 - 1, 2**32)
    for content in ("", "a", "<x>", "\0", "\ud800", " ")
    for word, strip, special in ((False, False, True), (True, True, False))
)  # fmt: skip
PARTS = {
    "normalizer": NORMALIZERS,
    "pre_tokenizer": PRE_TOKENIZERS,
    "post_processor": POST_PROCESSORS,
    "decoder": DECODERS,
    "padding": PADDING,
    "truncation": TRUNCATION,
    "model": MODELS,
    "added_tokens": ADDED,
}


def step(document: Any, rng: Random) -> Any:
    """The tokenizer with one part exchanged, or one change anywhere."""
    if isinstance(document, dict) and rng.random() < 0.5:
        name = rng.choice(list(PARTS))
        part = copy.deepcopy(rng.choice(PARTS[name]))
        if rng.random() < 0.4:
            part = json_changes.step(part, rng)
        old = document.get(name)
        document[name] = old + part if isinstance(old, list) and isinstance(part, list) and rng.random() < 0.6 else part
        return document
    if isinstance(document, dict) and isinstance(document.get("model"), dict) and rng.random() < 0.3:
        document["model"] = json_changes.step(document["model"], rng)
        return document
    return json_changes.step(document, rng)


TOKENIZER = Codec(json.loads, step, json_changes.encode)
