"""The tokens that end an answer: those that a model names in any place, and those whose name says so.

Files often name fewer ends than the model writes. So llama.cpp gathers them by name too (its llama-vocab.cpp), and so
does this module: the ends of a turn, of a text, and of a file in models of code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
