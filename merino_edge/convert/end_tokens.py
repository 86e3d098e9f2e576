"""The tokens and texts that end an answer: those that a model names in any place, and tokens whose name says so.

Files often name fewer ends than the model writes. So llama.cpp gathers them by name too (its llama-vocab.cpp), and so
does this module: the ends of a turn, of a text, and of a file in models of code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from merino_edge import limits
from merino_edge.errors import ArtefactError

TURNS: tuple[str, ...] = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
)
TURNS += ("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<turn|>", "<|tool_response>")
TEXTS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<\uff5cend▁of▁sentence\uff5c>")
CODE: tuple[str, ...] = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")
CODE += ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>")
NAMES = (*TURNS, *TEXTS, *CODE)


def end_token_ids(named: Iterable[int | None], tokens: Mapping[str, int]) -> tuple[int, ...]:
    """The ids in `named` in their order, then those of `tokens` (text to id) whose text is a known end."""
    by_name = {name: tokens[name] for name in NAMES if name in tokens}
    # In these vocabularies the token ends a part of an answer, and others end the answer.
    calls = by_name.keys() & {"<|call|>", "<|calls|>"}
    if calls and by_name.keys() & {"<|return|>", "<|flush|>"}:
        by_name.pop("<|end|>", None)
    if "<|tool_response>" in by_name:
        by_name.pop("</s>", None)
    return tuple(dict.fromkeys([*(i for i in named if i is not None), *sorted(by_name.values())]))


def stop_strings(value: Any, where: str) -> tuple[str, ...]:
    """The texts that end an answer, from the setting `stop_strings`: one, a list, or none.

    Raises ArtefactError where it is something else, or holds more than limits.MAX_MODEL_STOPS.
    """
    texts = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if len(texts) > limits.MAX_MODEL_STOPS or not all(isinstance(text, str) and text for text in texts):
        what = f"up to {limits.MAX_MODEL_STOPS} texts"
        raise ArtefactError(f"{where}: stop_strings is not {what}", "correct it, or remove it from the file")
    return tuple(dict.fromkeys(texts))
