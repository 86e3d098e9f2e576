"""What every reader gives: a checkpoint's content, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import limits
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Weights
from merino_edge.convert.layouts import Layout
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.tokenizer import ChatFormat
from merino_edge.weights import weight_shapes

if TYPE_CHECKING:
    import tokenizers

Step = Callable[[int, int], None]  # called with (weights read, weights in all)


@dataclass(frozen=True)
class Imported:
    """A model as read: everything a checkpoint holds."""

    architecture: Architecture
    weights: Weights  # float32, by the names of merino_edge.weights
    tokenizer_json: str
    chat: ChatFormat
    source: dict[str, Any]


def convert_weights(
    a: Architecture,
    layout: Layout,
    names: Iterable[str],
    load: Callable[[str], np.ndarray],
    *,
    where: str,
    step: Step,
) -> Weights:
    """Our weights from theirs: `load(name)` gives float32. Every name must have its place, every place its name."""
    expected, weights = weight_shapes(a), Weights()
    names = list(names)
    for done, name in enumerate(names, 1):
        ours = layout.ours(name)
        array = load(name)
        if ours == ("head.weight",) and a.tied_head:
            if not np.array_equal(array, load(_name_of("embedding.weight", layout, names, where))):
                raise UnsupportedError(
                    f"{where}: {name} differs from the embedding it is said to be tied to",
                    "set tie_word_embeddings to false",
                )
            continue
        if not ours or any(part not in expected for part in ours):
            raise UnsupportedError(f"{where}: weight {name} has no place in this model family", "choose another model")
        try:
            parts = layout.adapt(a, ours, array)
        except (ValueError, IndexError):  # it cannot be taken apart: its shape is wrong
            parts = [array]
        for part, value in zip(ours, parts, strict=False):
            if value.shape != expected[part]:
                raise ArtefactError(
                    f"{where}: {name} of shape {list(array.shape)} does not give {part} {list(expected[part])}",
                    "configuration and weights do not belong together",
                )
            weights[part] = value
        step(done, len(names))
    for part in expected:
        if part not in weights:
            raise ArtefactError(f"{where}: no weight for {part}", "the files are incomplete; download them again")
    return {part: weights[part] for part in expected}


def _name_of(part: str, layout: Layout, names: Sequence[str], where: str) -> str:
    for name in names:
        if layout.ours(name) == (part,):
            return name
    raise ArtefactError(f"{where}: no weight for {part}", "the files are incomplete; download them again")


def bind_template(template: str | None, where: str, **tokens: str | None) -> str | None:
    """The template with the special tokens it speaks of (bos_token, eos_token, ...) set at its top.

    A checkpoint keeps ids of what the tokenizer prepends and what ends a text; a template may mean others.
    Raises ArtefactError for a template over its limit.
    """
    if template is None:
        return None
    if len(template.encode()) > limits.MAX_TEMPLATE_BYTES:
        raise ArtefactError(
            f"{where}: chat template over {limits.MAX_TEMPLATE_BYTES} bytes", "see merino_edge/limits.py"
        )
    used = {name: token for name, token in tokens.items() if token and re.search(rf"\b{name}\b", template)}
    # Rendering trims the line break after a block, so the text itself stays what it was.
    bound = "".join(f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}\n" for name, token in used.items())
    return bound + template


def load_tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    """Build a tokenizer from `tokenizer.json`'s text, without the lengths it cuts or pads to. Raises ArtefactError."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ArtefactError(f"{where} is not a tokenizer ({error})", "it is damaged; download it again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def check_tokenizer(backend: tokenizers.Tokenizer, vocab_size: int, chat: ChatFormat, where: str) -> None:
    """Raise ArtefactError unless every id that the tokenizer or the chat format can give has an embedding."""
    special = [*chat.eos_token_ids, chat.bos_token_id or 0]
    highest = max([*backend.get_vocab(with_added_tokens=True).values(), *special])
    if highest >= vocab_size:
        raise ArtefactError(
            f"{where}: token id {highest} has no embedding, the model knows {vocab_size} tokens",
            "model and tokenizer do not belong together",
        )
