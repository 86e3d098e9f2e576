"""An imported model: a checkpoint's content, and the checks that every reader applies to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import limits, tokenizer_file
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Weights
from merino_edge.convert.chat_check import check_chat
from merino_edge.convert.folding import Folding, layer_names
from merino_edge.convert.layouts import Layout
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.tokenizer import ChatFormat, Tokenizer
from merino_edge.weights import weight_shapes

if TYPE_CHECKING:
    import tokenizers

# Ends of names that only quantised weights have beside them.
QUANTISED = ("_scale", "_scale_inv", ".SCB", ".qweight", ".qzeros", ".scales", ".absmax", ".quant_map", "_packed")
OnWeight = Callable[[int, int], None]  # called with (weights read, weights in all)


@dataclass(frozen=True)
class Imported:
    """A model as read: everything that a checkpoint holds."""

    architecture: Architecture
    weights: Weights  # float32, by the names of merino_edge.weights
    tokenizer_json: str
    chat: ChatFormat
    source: dict[str, Any]
    notes: tuple[str, ...] = ()  # what a user should know of it


def convert_weights(
    a: Architecture,
    layout: Layout,
    names: Iterable[str],
    load: Callable[[str], np.ndarray],
    *,
    where: str,
    on_weight: OnWeight,
    folding: Folding | None = None,
) -> Weights:
    """Our weights from a model's weights `names`; `load(name)` gives one as float32.

    The names and our weights must correspond one to one, those that `folding` makes apart. Raises UnsupportedError for
    a weight without equivalent, and ArtefactError for a missing weight or a wrong shape.
    """
    expected, weights, folding = weight_shapes(a), Weights(), folding or Folding()
    names, layers = list(names), layer_names(a.blocks)
    for done, name in enumerate(names, 1):
        ours = tuple(_in_block(part, layers) for part in layout.ours(name))
        if not ours and name.endswith(QUANTISED):
            raise UnsupportedError(f"{where}: {name} belongs to quantised weights", "choose the unquantised model")
        array = load(name)
        if ours == ("head.weight",) and a.tied_head and not _has_embedding(layout, names):
            ours = ("embedding.weight",)  # of two tied weights, a file may hold either
        if ours == ("head.weight",) and a.tied_head:
            if not np.array_equal(array, load(_embedding(layout, names))):
                raise UnsupportedError(
                    f"{where}: {name} differs from the embedding it is said to be tied to",
                    "set tie_word_embeddings to false",
                )
            continue
        if not ours:
            raise UnsupportedError(f"{where}: weight {name} has no place in this model family", "choose another model")
        if other := [part for part in ours if part not in expected]:
            raise UnsupportedError(
                f"{where}: {name} has no place in a model of this configuration, which has no {other[0]}",
                "configuration and weights do not belong together",
            )
        try:
            parts = layout.adapt(a, ours, array)
        except (ValueError, IndexError, TypeError):  # it cannot be split: its shape is wrong
            parts = [array]
        for part, value in zip(ours, parts, strict=False):
            if value.shape != expected[part]:
                raise ArtefactError(
                    f"{where}: {name} of shape {list(array.shape)} does not give {part} {list(expected[part])}",
                    "configuration and weights do not belong together",
                )
            # Transposed ones would be copied all at once where they are written.
            weights[part] = np.ascontiguousarray(folding.apply(a, part, value))
        on_weight(done, len(names))
    for part, shape in expected.items():
        if part not in weights and (constant := folding.constant(part, shape)) is not None:
            weights[part] = constant
        if part not in weights:
            raise ArtefactError(f"{where}: no weight for {part}", "the files are incomplete; download them again")
    return {part: weights[part] for part in expected}


def _has_embedding(layout: Layout, names: Sequence[str]) -> bool:
    return any(layout.ours(name) == ("embedding.weight",) for name in names)


def _embedding(layout: Layout, names: Sequence[str]) -> str:
    return next(name for name in names if layout.ours(name) == ("embedding.weight",))


def _in_block(name: str, layers: Sequence[str]) -> str:
    """A weight's name in its block, from that of a layout, which counts layers through all blocks."""
    layer = re.match(r"blocks\.0\.layers\.(\d+)\.", name)
    if layer is None or int(layer[1]) >= len(layers):
        return name
    return layers[int(layer[1])] + name[layer.end() :]


def bind_template(template: str | None, where: str, **tokens: str | None) -> str | None:
    """The template with the special tokens that it uses (bos_token, eos_token, ...) set at its top.

    A checkpoint keeps only the ids of the prepended token and of the end tokens. A template may mean other tokens. A
    name without a token stays undefined, as in transformers. Raises ArtefactError for a template over its limit.
    """
    if template is None or not template.strip():
        return None
    if len(template.encode(errors="replace")) > limits.MAX_TEMPLATE_BYTES:
        raise ArtefactError(
            f"{where}: chat template over {limits.MAX_TEMPLATE_BYTES} bytes", "see merino_edge/limits.py"
        )
    used = {name: token for name, token in tokens.items() if token and re.search(rf"\b{name}\b", template)}
    # Rendering trims the line break after a block, so the text itself stays what it was.
    bound = "".join(f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}\n" for name, token in used.items())
    return bound + template


def load_tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json` text, without its truncation and padding. Raises ArtefactError."""
    return tokenizer_file.load(text, where)[0]


def check_tokenizer(backend: tokenizers.Tokenizer, vocab_size: int, chat: ChatFormat, where: str) -> tuple[str, ...]:
    """Raise ArtefactError unless every token id has an embedding, and the tokenizer knows those of the chat format.

    Raises UnsupportedError where the chat template fails. Returns what a user should know of the chat format.
    """
    highest = max([*backend.get_vocab(with_added_tokens=True).values(), chat.largest_token_id])
    if highest >= vocab_size:
        raise ArtefactError(
            f"{where}: token id {highest} has no embedding, the model knows {vocab_size} tokens",
            "model and tokenizer do not belong together",
        )
    for token in chat.eos_token_ids:
        if backend.id_to_token(token) is None:
            raise ArtefactError(
                f"{where}: the model's end token {token} is none of the tokenizer's {backend.get_vocab_size()}",
                "model and tokenizer do not belong together",
            )
    return tuple(check_chat(Tokenizer(backend, chat), where))
