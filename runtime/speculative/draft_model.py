"""Draft model: a smaller model with the same tokenizer proposes its greedy continuation.

Source: speculative decoding, Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, with drafts that are not
sampled. The large model's sampler decides whether a draft token is accepted, so the distribution of answers stays
that of the large model (merino_edge.runtime.generation).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from merino_edge.bundle import Bundle
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.session import Session


class DraftModel:
    """A second engine that follows the text. Implements merino_edge.runtime.speculative.drafter.Proposer."""

    free = False

    def __init__(self, engine: Engine) -> None:
        self._session = Session(engine, exact=False)  # a draft may be any
        self._ids: list[int] = []

    @staticmethod
    def open(path: Path | str, beside: Bundle, threads: int | None = None, *, cpu: bool = False) -> DraftModel:
        """Open the bundle at `path` as a draft model for the bundle `beside`.

        Raises InputError where the two have different tokenizers, and the errors of `open_engine`.
        """

        def check(draft: Bundle) -> None:
            main_hash, draft_hash = (
                b.manifest["files"].get("tokenizer.json", {}).get("sha256") for b in (beside, draft)
            )
            if main_hash != draft_hash or beside.architecture.vocab_size != draft.architecture.vocab_size:
                raise InputError(
                    f"{draft.path} has another tokenizer than {beside.path}, so it cannot draft for it",
                    "give a bundle of a model with the same tokenizer",
                )

        engine, _, _ = open_engine(path, threads, cpu=cpu, on_bundle=check)
        return DraftModel(engine)

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        """Start a new text, and run its prompt if it fits the context."""
        self._ids = list(prompt)
        if len(prompt) <= self._session.engine.max_positions:
            self._session.prefill(self._ids, cancel)

    def push(self, token: int) -> None:
        """Append the next token of the text."""
        self._ids.append(token)

    def propose(self, max_tokens: int) -> list[int]:
        """Return the next `max_tokens` tokens by greedy decoding; fewer where the context ends.

        Accepted draft tokens are in the engine's cache already and are not run again.
        """
        max_tokens = min(max_tokens, self._session.engine.max_positions - len(self._ids) + 1)
        if max_tokens < 1:
            return []
        logits = self._session.prefill(self._ids)
        assert logits is not None  # there is no cancel flag
        tokens = [int(logits.argmax())]
        while len(tokens) < max_tokens:
            tokens.append(int(self._session.step(tokens[-1])[0].argmax()))
        return tokens

    def close(self) -> None:
        """Close the draft model's engine."""
        self._session.engine.close()
