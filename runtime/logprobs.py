"""Log-probabilities of tokens: those of an answer as it is sampled, and those of a prompt.

They are the model's own, before penalties, temperature, filters and forms. Sampling is not changed by recording.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from merino_edge.runtime.engine import Logits
from merino_edge.runtime.session import Session
from merino_edge.runtime.turns import PromptPiece

LEAST = -9999.0  # what JSON has in place of -infinity, as OpenAI writes it
ROWS = 64  # of logits at a time, when a prompt is scored


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in nats, None for a prompt's first, and the most likely tokens at its place."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest first


class LogprobRecorder:
    """Collects `answer` while it is sampled, and `prompt` where `of_prompt`."""

    def __init__(self, top: int, *, of_prompt: bool = False) -> None:
        """`top` is the number of the most likely tokens that are kept at each place."""
        self.of_prompt, self._top = of_prompt, top
        self.prompt: list[TokenLogprob] = []
        self.answer: list[TokenLogprob] = []  # end tokens too

    def record(self, logits: Logits, token: int) -> None:
        """Keep the log-probability of `token`, sampled from `logits` [V]."""
        self.answer.append(self._entry(logits, token))

    def score(
        self, session: Session, ids: Sequence[int], cancel: threading.Event
    ) -> Generator[PromptPiece, None, None]:
        """Run the prompt `ids` and keep the log-probability of each token behind the first, where `of_prompt`.

        It stops before every piece, so that others may run. The session holds nothing afterwards, so an answer has the
        same bits as without.
        """
        if not self.of_prompt:
            return
        engine = session.engine
        with session.use:
            session.cut(0)
        self.prompt = [TokenLogprob(ids[0], None)]
        rows = min(ROWS, engine.max_rows)
        for start in range(0, len(ids) - 1, rows):
            yield PromptPiece()
            if cancel.is_set():
                return
            piece = np.asarray(ids[start : start + rows], np.int64)
            following = ids[start + 1 : start + 1 + len(piece)]
            with session.use:
                logits = engine.forward_rows(piece, start, len(piece))  # [T, V]
                self.prompt += [self._entry(row, token) for row, token in zip(logits, following, strict=False)]

    def _entry(self, logits: Logits, token: int) -> TokenLogprob:
        below = logits.astype(np.float64) - logits.max()
        total = float(np.log(np.exp(below).sum()))
        count = min(self._top, below.size)
        top: list[int] = []
        if count:
            top = np.argpartition(below, below.size - count)[below.size - count :].tolist()
            top.sort(key=lambda i: (-below[i], i))

        def logprob(i: int) -> float:
            return max(float(below[i]) - total, LEAST)

        return TokenLogprob(token, logprob(token), tuple((i, logprob(i)) for i in top))
