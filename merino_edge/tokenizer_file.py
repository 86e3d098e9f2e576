"""A `tokenizer.json`: what it may make the `tokenizers` library do is checked before the library reads it.

Such a file is a small program: steps that replace, split and decode text. The library takes any number, so a file can
make it take all memory, loop or abort. Here every id, length and count has a limit (merino_edge.limits), and so has the
growth of a text. Padding and truncation are left out: no model here wants either. Time is bounded when text is encoded.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merino_edge import artefact, limits
from merino_edge.errors import ArtefactError
from merino_edge.foreign_call import call

if TYPE_CHECKING:
    import tokenizers

HINT = "make the artefact again, or download the model again"
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PROBE = "The 3 quick-brown foxes, don't they? “Zwölf” ǆ 狐 🦊\n\tx = [1.5];  end"
# How many times longer a step can make the UTF-8 of a text, at most (Unicode's report 15 for NFC to NFKD). A step that
# is not here keeps the length, or has a rule below.
GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 6}
GROWTH |= {"ByteLevel": 3, "Metaspace": 6}
MOST_DECODER_GROWTH = 64
# Groups that repeat without end and hold another repetition without end: matching takes exponential time.
ENDLESS = re.compile(r"\*|\+|\{\d+,\}")


@dataclass(frozen=True)
class Growth:
    """How many times longer a text can become, at most: by the normalizer, and then by the pre-tokenizer."""

    normalizer: float = 1.0
    pre_tokenizer: float = 1.0


def load(text: str, where: str) -> tuple[tokenizers.Tokenizer, Growth]:
    """The tokenizer of a `tokenizer.json`, and how long it can make a text. Raises ArtefactError naming `where`."""
    import tokenizers

    document = artefact.parse_json(text, where)
    try:
        growth = _checked(document)
    except _Refused as reason:
        raise ArtefactError(f"{where}: {reason}", HINT) from None
    if document.get("padding") is not None or document.get("truncation") is not None:
        text = json.dumps({**document, "padding": None, "truncation": None}, ensure_ascii=False)
    what = f"{where} is not a tokenizer"
    backend = call(lambda: tokenizers.Tokenizer.from_str(text), what, HINT, quiet=True)
    call(lambda: _probe(backend), f"{where} does not work", HINT, seconds=limits.TOKENIZER_SECONDS, quiet=True)
    return backend, growth


def _probe(backend: tokenizers.Tokenizer) -> None:
    """Let a panic come now: at the first text it would come too, but with half the work done."""
    try:
        ids = backend.encode_batch_fast([PROBE], add_special_tokens=False)[0].ids
        for some in ([], ids, *([token] for token in ids)):
            backend.decode(some)
    except Exception:  # an error about this very text, such as an unknown word
        return


class _Refused(Exception):
    """The text says what of the file is beyond a limit."""


def _checked(document: Any) -> Growth:
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise _Refused("it is not a tokenizer: it has no model")
    # It is not used. But a length that no model can have means that the file is an attack, or damaged.
    _check_setting("padding", document.get("padding"), 0)
    _check_added_tokens(document.get("added_tokens") or [])
    _check_model(document["model"])
    growth = {}
    for kind in STEPS:
        steps = list(_steps(document.get(kind)))
        if len(steps) > limits.MAX_TOKENIZER_STEPS:
            raise _Refused(f"its {kind} has {len(steps)} steps, the limit is {limits.MAX_TOKENIZER_STEPS}")
        for step in steps:
            _check_step(kind, step)
        growth[kind] = float(math.prod(map(_growth, steps)))
    encoding, decoding = growth["normalizer"] * growth["pre_tokenizer"], growth["decoder"]
    if encoding > limits.MAX_TEXT_GROWTH or decoding > MOST_DECODER_GROWTH:
        raise _Refused(f"it can make a text {max(encoding, decoding):.3g} times longer")
    return Growth(growth["normalizer"], growth["pre_tokenizer"])


def _check_added_tokens(added: Any) -> None:
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise _Refused("its added tokens are no list of tokens")
    if len(added) > limits.MAX_ADDED_TOKENS:
        raise _Refused(f"it adds {len(added)} tokens, the limit is {limits.MAX_ADDED_TOKENS}")
    for token in added:
        _check_token(token.get("content"), token.get("id"))


def _check_model(model: dict[str, Any]) -> None:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram's: [token, score] each
        pairs = [(entry[0] if isinstance(entry, list) and entry else None, i) for i, entry in enumerate(vocabulary)]
    elif isinstance(vocabulary, dict):
        pairs = list(vocabulary.items())
    else:
        raise _Refused("its model has no vocabulary")
    if len(pairs) > limits.MAX_VOCAB_SIZE:
        raise _Refused(f"it has {len(pairs)} tokens, the limit is {limits.MAX_VOCAB_SIZE}")
    for token, token_id in pairs:
        _check_token(token, token_id)
    merges = model.get("merges", [])
    if not isinstance(merges, list) or len(merges) > limits.MAX_MERGES:
        raise _Refused(f"its merges are no list of at most {limits.MAX_MERGES}")
    for name, value in model.items():
        if name not in ("vocab", "merges"):
            _check_setting(name, value, 0)
    longest = model.get("max_input_chars_per_word", 0)  # a word takes time by the square of its length
    if not isinstance(longest, int) or longest > limits.MAX_WORD_CHARACTERS:
        raise _Refused(f"max_input_chars_per_word is {longest}, the limit is {limits.MAX_WORD_CHARACTERS}")


def _check_token(token: Any, token_id: Any) -> None:
    if not isinstance(token, str) or len(token) > limits.MAX_TOKEN_CHARACTERS:
        raise _Refused(f"a token is no text of at most {limits.MAX_TOKEN_CHARACTERS} characters")
    if type(token_id) is not int or not 0 <= token_id < limits.MAX_VOCAB_SIZE:
        raise _Refused(f"the token {token[:40]!r} has no id of 0 to {limits.MAX_VOCAB_SIZE - 1}")


# --- steps -----------------------------------------------------------------------------------------


def _steps(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The steps in a step, sequences resolved."""
    if value is None:
        return
    if not isinstance(value, dict) or depth > limits.MAX_TOKENIZER_DEPTH:
        raise _Refused("a step is no object, or lies too deep")
    inner = [name for name in ("normalizers", "pretokenizers", "processors", "decoders") if name in value]
    for name in inner:
        if not isinstance(value[name], list):
            raise _Refused(f"{name} is no list of steps")
        for step in value[name]:
            yield from _steps(step, depth + 1)
    if not inner:
        yield value


def _check_step(kind: str, step: dict[str, Any]) -> None:
    name = step.get("type")
    for setting, value in step.items():
        if setting == "precompiled_charsmap":
            _check_charsmap(value)
        else:
            _check_setting(f"{name}'s {setting}", value, 0)
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and "" in (pattern.get("String"), pattern.get("Regex")):
        raise _Refused(f"{name} has an empty pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        _check_regex(pattern["Regex"], strict=kind == "decoder")
    if step.get("length", 1) == 0:
        raise _Refused("FixedLength has the length 0")
    if kind == "decoder" and isinstance(step.get("stop"), int) and step["stop"] > 1:
        raise _Refused("Strip cuts more from the end of a token than it has")  # the library panics


def _check_setting(name: str, value: Any, depth: int) -> None:
    """Numbers, texts and lists anywhere in a setting are of a size that a tokenizer can mean."""
    if isinstance(value, str) and len(value) > limits.MAX_TOKENIZER_SETTING:
        raise _Refused(f"{name} has {len(value)} characters, the limit is {limits.MAX_TOKENIZER_SETTING}")
    if isinstance(value, (int, float)) and not abs(value) <= limits.MAX_POSITIONS:
        raise _Refused(f"{name} is no number up to {limits.MAX_POSITIONS}")
    if isinstance(value, (list, dict)):
        if len(value) > limits.MAX_TOKENIZER_SETTING or depth > limits.MAX_TOKENIZER_DEPTH:
            raise _Refused(f"{name} has too many parts, or they lie too deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_setting(name, part, depth + 1)


def _check_regex(pattern: str, *, strict: bool) -> None:
    """Refuse a repetition of a repetition. `strict`: more than one repetition without end, as in no decoder's."""
    endless, group = 0, [False]  # whether each open group has a repetition without end
    at, in_class = 0, 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 2
            continue
        if character == "[":
            in_class += 1
        elif character == "]" and in_class:
            in_class -= 1
        elif in_class:
            pass
        elif character == "(":
            group.append(False)
        elif character == ")" and len(group) > 1:
            inner = group.pop()
            if inner and ENDLESS.match(pattern, at + 1):
                raise _Refused("a regular expression repeats a repetition, which can take for ever")
            group[-1] |= inner
        elif ENDLESS.match(pattern, at):
            endless += 1
            group[-1] = True
        at += 1
    if strict and endless > 1:
        raise _Refused("a decoder's regular expression has more than one repetition")


def check_charsmap(data: bytes, where: str) -> None:
    """Raise ArtefactError for a precompiled map of which the library would read beyond the end, or put in much."""
    try:
        _check_charsmap(base64.b64encode(data).decode())
    except _Refused as reason:
        raise ArtefactError(f"{where}: {reason}", "download it again") from None


def _check_charsmap(value: Any) -> None:
    """A SentencePiece map: the size of its trie, the trie, and the texts that it puts in, with a 0 after each."""
    data = _charsmap(value)
    if data and (len(data) < 4 or int.from_bytes(data[:4], "little") > len(data) - 4):
        raise _Refused("its precompiled map is cut off")
    if (longest := _longest_text(data)) > limits.MAX_CHARSMAP_TEXT:
        raise _Refused(f"its precompiled map puts in {longest} bytes, the limit is {limits.MAX_CHARSMAP_TEXT}")


def _charsmap(value: Any) -> bytes:
    if value is None:
        return b""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise _Refused("its precompiled map is not base64") from None


def _longest_text(charsmap: bytes) -> int:
    return max(map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")), default=0)


def _growth(step: dict[str, Any]) -> float:
    """How many times longer the step can make a text, at most.

    Where the library does not know a type, it goes by the fields. So this goes by the fields first.
    """
    if "prepend" in step:
        return 1 + len(str(step["prepend"]).encode(errors="replace"))
    if "precompiled_charsmap" in step:
        return max(1, _longest_text(_charsmap(step["precompiled_charsmap"])))
    if "pattern" in step and "content" in step:
        content, pattern = len(str(step["content"]).encode(errors="replace")), step["pattern"]
        text = pattern.get("String") if isinstance(pattern, dict) else None
        return max(1.0, content / len(text.encode(errors="replace")) if isinstance(text, str) and text else 1 + content)
    name = step.get("type")
    return GROWTH.get(name, 1) if isinstance(name, str) else max(GROWTH.values())
