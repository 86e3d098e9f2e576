"""The forms of a prepared corpus's header and of the record of what was verified (merino_edge.data.corpus, shards)."""

from __future__ import annotations

from typing import Annotated

from merino_edge.forms import UNSET, Count, Form, Meta, Sha256, Text, UnsetType, Vocabulary

Tokens = Annotated[int, Meta(ge=1, le=2**40)]


class Shard(Form):
    tokens: Tokens
    tokens_sha256: Sha256
    learned_sha256: Sha256 | None


class Header(Form):
    """corpus.json."""

    vocab_size: Vocabulary
    tokenizer_tokens: Count
    tokens: Tokens
    conversations: Count
    shards: Annotated[list[Shard], Meta(min_length=1)]
    corpus_sha256: Sha256
    tokenizer_sha256: Sha256
    chat_sha256: Sha256
    conversations_sha256: Sha256 | None
    learned_tokens: Count | UnsetType = UNSET
    unanswered: Count | UnsetType = UNSET
    sources: list[Text] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if (whole := sum(shard.tokens for shard in self.shards)) != self.tokens:
            raise ValueError(f"the shards have {whole} tokens, not {self.tokens}")
        masked = {shard.learned_sha256 is not None for shard in self.shards}
        if masked != {self.conversations_sha256 is not None}:
            raise ValueError("conversations and shards of what is learned do not belong together")


class Verified(Form):
    """verified.json: sizes and times of files that were whole."""

    header_sha256: Sha256
    files: dict[str, tuple[int, int]]
