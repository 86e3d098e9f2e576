"""The forms of the headers of stored logits and of a synthetic corpus. They need no PyTorch."""

from __future__ import annotations

from typing import Annotated, Any

from merino_edge.data.forms import Tokens
from merino_edge.forms import Count, Form, Line, Meta, Positions, Sha256, Text, Vocabulary


class LogitsShard(Form):
    tokens: Tokens
    logs_sha256: Sha256
    ids_sha256: Sha256


class TeacherLogits(Form):
    """logits.json (merino_edge.distillation.teacher_logits)."""

    teacher_sha256: Line
    corpus_sha256: Line
    vocab_size: Vocabulary
    tokens: Tokens
    top_k: Vocabulary
    window: Positions
    stride: Positions
    batch: Count
    precision: Line
    shards: list[LogitsShard]
    finished: bool

    def __post_init__(self) -> None:
        done = sum(shard.tokens for shard in self.shards)
        if done > self.tokens or (self.finished and done != self.tokens):
            raise ValueError(f"the shards have {done} tokens, not {self.tokens}")
        if self.top_k > self.vocab_size:
            raise ValueError(f"top_k is {self.top_k} of a vocabulary of {self.vocab_size}")


class WrittenCorpus(Form):
    """CORPUS.json (merino_edge.distillation.synthetic_corpus)."""

    teacher: dict[str, Any]
    licence: Text | None
    prompts: dict[str, Any]
    options: dict[str, Any]
    finished: bool
    dropped: dict[Line, Count]
    batches: Count
    samples: Count
    kept: Count
    tokens: Count
    bytes: Annotated[int, Meta(ge=0, le=2**50)]
    content_sha256: Sha256
