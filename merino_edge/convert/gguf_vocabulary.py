"""A tokenizer as metadata of GGUF: the inverse of merino_edge.convert.gguf_tokenizer.

llama.cpp knows a fixed set of ways to divide a text. So the one that divides difficult texts alike is looked for, and
what is found is read back and compared. A tokenizer that llama.cpp cannot have is refused.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge.convert import gguf_tokenizer
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.gguf_tokenizer import BYTE, CONTROL, KINDS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from merino_edge.errors import ArtefactError, MerinoError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

PREFIX = "tokenizer.ggml."
PROBES = (
    "The 3 quick-brown foxes, don't they? I'LL say: we've 12,345.67 x1000000 reasons!",
    "  two  spaces\n\n\nthree lines\r\n\ttab \u00a0no-break\u3000wide \n end ",
    "camelCase HTTPServer snake_case __init__(self): # comment\n    return x**2 // {y}\n",
    "na\u00efve Zu\u0308rich e\u0301t\u00e9 \u212b \ufb01 \u00bd \u2167 \u01c5 \u02b0",
    "日本語のテスト 漢字123 한국어 приветМир",
    "हिन्दी ภาษาไทย العربية ١٢٣",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd $5.00 50% a@b.c https://d.e/f?g=h&i#j ...!?",
    "'s 'S '\u2019s it'D \u2018q\u2019 \u201cq\u201d \u2014 a/b /\n/c ?\n\n!",
)
OTHER = "export it as a folder for transformers: merino-edge export-hf {where} --out FOLDER"


def describe(
    backend: tokenizers.Tokenizer, special: Mapping[str, int | None], vocab_size: int, *, adds_bos: bool, where: str
) -> dict[str, Any]:
    """The metadata: strings, numbers, and lists of them. `special` has the ids of bos, eos, eot and eom.

    Raises UnsupportedError where llama.cpp would divide a text otherwise, ArtefactError for ids beyond `vocab_size`.
    """
    document = json.loads(backend.to_str())
    tokens, types = _tokens(document, vocab_size, where)
    values: dict[str, Any] = {f"{PREFIX}tokens": tokens, f"{PREFIX}token_type": types}
    for name, token_id in special.items():
        if token_id is not None:
            values[f"{PREFIX}{name}_token_id"] = token_id
    values[f"{PREFIX}add_bos_token"] = adds_bos
    for tried in _candidates(backend, document, tokens):
        found = {**values, **tried}
        try:
            read_back = gguf_tokenizer.build(as_read(found, where))
        except MerinoError:
            continue
        if all(
            read_back.encode(text, add_special_tokens=False).ids == backend.encode(text, add_special_tokens=False).ids
            for text in PROBES
        ):
            return found
    raise UnsupportedError(
        f"{where}: no tokenizer of llama.cpp divides a text as this model's does", OTHER.format(where=where)
    )


def as_read(values: Mapping[str, Any], where: str) -> Metadata:
    """Metadata that is to be written, as a reader of the file has it."""

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, list):
            return [item.encode() for item in value] if value and isinstance(value[0], str) else _array(value)
        return value

    return Metadata({key: one(value) for key, value in values.items()}, where)


def _array(value: list[Any]) -> np.ndarray:
    return np.array(value, np.float32 if value and isinstance(value[0], float) else np.int32)


def _tokens(document: Mapping[str, Any], vocab_size: int, where: str) -> tuple[list[str], list[int]]:
    """Every token by its id, and its type. Ids without a token are unused.

    Raises ArtefactError where a token has an id that the model does not know.
    """
    model = document["model"]
    vocabulary = model["vocab"]
    by_text = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    added_tokens = document.get("added_tokens") or []
    taken = {*by_text, *(added["content"] for added in added_tokens)}
    highest = max([*by_text.values(), *(added["id"] for added in added_tokens)], default=-1)
    if highest >= vocab_size:
        raise ArtefactError(
            f"{where}: token id {highest} has no embedding, the model knows {vocab_size} tokens",
            "model and tokenizer do not belong together",
        )
    tokens = [f"[PAD{i}]" + "_" * (f"[PAD{i}]" in taken) for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    has_bytes = bool(model.get("byte_fallback"))
    for token, i in by_text.items():
        tokens[i] = token
        types[i] = BYTE if has_bytes and len(token) == 6 and token.startswith("<0x") else NORMAL
    for added in added_tokens:
        i, content = added["id"], added["content"]
        is_unknown = content == model.get("unk_token") or i == model.get("unk_id")
        tokens[i] = content
        types[i] = UNKNOWN if is_unknown else CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _candidates(
    backend: tokenizers.Tokenizer, document: Mapping[str, Any], tokens: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The metadata of each way of llama.cpp that may be this tokenizer's."""
    model = document["model"]
    if model["type"] == "BPE":
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        if model.get("byte_fallback"):
            for prefix in (True, False):
                scores = {f"{PREFIX}scores": _scores(model, tokens), f"{PREFIX}add_space_prefix": prefix}
                yield {f"{PREFIX}model": "llama", f"{PREFIX}pre": "default", **_unknown(model, tokens), **scores}
            return
        for name, kind in KINDS.items():
            if kind.whole_words == bool(model.get("ignore_merges")) and _divides_alike(backend, kind):
                yield {f"{PREFIX}model": "gpt2", f"{PREFIX}pre": name, f"{PREFIX}merges": merges}
    elif model["type"] == "Unigram":
        listed = [float(score) for _, score in model["vocab"]]
        common = {f"{PREFIX}model": "t5", f"{PREFIX}pre": "default", **_unknown(model, tokens)}
        common[f"{PREFIX}scores"] = listed + [0.0] * (len(tokens) - len(listed))
        if (charsmap := _charsmap(document.get("normalizer"))) is not None:
            common[f"{PREFIX}precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
        for prefix, joins in itertools.product((True, False), repeat=2):
            spaces = {f"{PREFIX}add_space_prefix": prefix, f"{PREFIX}remove_extra_whitespaces": joins}
            yield {**common, **spaces}


def _charsmap(normalizer: Any) -> bytes | None:
    """The map of SentencePiece in a normalizer or one of its parts."""
    if not isinstance(normalizer, dict):
        return None
    if normalizer.get("type") == "Precompiled":
        return base64.b64decode(normalizer["precompiled_charsmap"])
    return next((found for part in normalizer.get("normalizers") or [] if (found := _charsmap(part))), None)


def _divides_alike(backend: tokenizers.Tokenizer, kind: gguf_tokenizer.Kind) -> bool:
    normalizer, divider = gguf_tokenizer.steps(kind)

    def pieces(text: str, normal: Any, pre: Any) -> list[str]:
        text = text if normal is None else normal.normalize_str(text)
        return [piece for piece, _ in pre.pre_tokenize_str(text)] if pre is not None else [text]

    return all(
        pieces(text, backend.normalizer, backend.pre_tokenizer) == pieces(text, normalizer, divider) for text in PROBES
    )


def _unknown(model: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, int]:
    unknown = tokens.index(model["unk_token"]) if model.get("unk_token") in tokens else model.get("unk_id")
    return {} if unknown is None else {f"{PREFIX}unknown_token_id": unknown}


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """A score for each token, higher the earlier a merge makes it: so llama.cpp joins pairs in the order of merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
