"""Guesses from a smaller model with the same tokenizer: what it would say next, greedily ("speculative decoding").

Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, with drafts that are not sampled: whether a guess is
right is for the large model's sampler to say, so its distribution stays what it is (merino_edge.runtime.generation).
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
        self._session = Session(engine)
        self._ids: list[int] = []

    @staticmethod
    def open(path: Path | str, beside: Bundle, threads: int | None = None, *, cpu: bool = False) -> DraftModel:
        """The bundle at `path`, to guess for another. Raises InputError where its tokens are others, and as
        `open_engine`."""

        def check(loaded: Bundle) -> None:
            first, second = (b.manifest["files"].get("tokenizer.json", {}).get("sha256") for b in (beside, loaded))
            if first != second or beside.architecture.vocab_size != loaded.architecture.vocab_size:
                raise InputError(
                    f"{loaded.path} has another tokenizer than {beside.path}, so it cannot guess for it",
                    "give a bundle of a model with the same tokenizer",
                )

        engine, _, _ = open_engine(path, threads, cpu=cpu, on_bundle=check)
        return DraftModel(engine)

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        self._ids = list(prompt)
        if len(prompt) <= self._session.engine.max_positions:
            self._session.prefill(self._ids, cancel)

    def push(self, token: int) -> None:
        self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """The `most` tokens that it holds likeliest, one after the other; fewer where its context ends.

        What the engine has run already, of the text or of guesses that were right, is not run again.
        """
        most = min(most, self._session.engine.max_positions - len(self._ids) + 1)
        if most < 1:
            return []
        logits = self._session.prefill(self._ids)
        assert logits is not None  # nothing cancels it
        tokens = [int(logits.argmax())]
        while len(tokens) < most:
            tokens.append(int(self._session.step(tokens[-1])[0].argmax()))
        return tokens

    def close(self) -> None:
        self._session.engine.close()
