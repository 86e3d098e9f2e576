"""End tokens are those that llama.cpp gathers: what its log lists for the vocabularies of public models."""

from __future__ import annotations

import pytest

from merino_edge.convert.end_tokens import end_token_ids

QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|fim_prefix|>": 151659}
QWEN |= {"<|fim_pad|>": 151662, "<|repo_name|>": 151663, "<|file_sep|>": 151664, "end": 6}
SMOLLM2 = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3, "<reponame>": 4, "<file_sep>": 5}
LLAMA = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eom_id|>": 128008, "<|eot_id|>": 128009}
GEMMA3 = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106}
HARMONY = {"<|endoftext|>": 10, "<|return|>": 11, "<|end|>": 12, "<|call|>": 13, "<|start|>": 14}
TOOLS = {"</s>": 1, "<eos>": 2, "<turn|>": 3, "<|tool_response>": 4}


@pytest.mark.parametrize(
    ("named", "tokens", "ends"),
    [
        ((151645,), QWEN, (151645, 151643, 151662, 151663, 151664)),
        ((2,), SMOLLM2, (2, 0, 4)),
        ((128009,), LLAMA, (128009, 128001, 128008)),
        ((1, 106), GEMMA3, (1, 106)),
        ((None, 11), HARMONY, (11, 10, 13)),
        ((2,), TOOLS, (2, 3, 4)),
        ((12,), HARMONY, (12, 10, 11, 13)),  # a file names it
        ((7, 5, 7), {}, (7, 5)),
        ((), {"The": 1}, ()),
        ((1,), {"<\uff5cend▁of▁sentence\uff5c>": 1, "</think>": 2}, (1,)),
    ],
)
def test_ends_by_metadata_and_by_name(named: tuple[int | None, ...], tokens: dict[str, int], ends: tuple[int]) -> None:
    assert end_token_ids(named, tokens) == ends
