"""What an answer waits for before it goes on: a step of the model, or its turn to run a piece of its prompt.

Whoever drives one answer alone runs them at once. Whoever drives several chooses the order, and may run the steps of
several answers together (merino_edge.runtime.shared_sessions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merino_edge.runtime.engine import Logits, Row, TokenIds

if TYPE_CHECKING:
    from merino_edge.runtime.session import Session


class PromptPiece:
    """A piece of a prompt runs when its answer goes on."""

    def run(self) -> None:
        """Nothing has to run before."""


@dataclass(eq=False)
class Step:
    """A token, and draft tokens after it, that must run before the answer goes on.

    `topk` is how many of the largest logits are needed, None for whole rows.
    """

    session: Session
    token: int
    draft: Sequence[int] = ()
    topk: int | None = None
    rows: Logits | None = None  # [1 + N, V], or [1, K] with their `ids`, once it has run
    ids: TokenIds | None = None  # [K]

    def run(self) -> None:
        """Run it by itself."""
        if self.topk is None:
            self.rows = self.session.step(self.token, self.draft)
        else:
            row, self.ids = self.session.step_topk(self.token, self.topk)
            self.rows = row[None]

    @property
    def can_join(self) -> bool:
        """Whether it may be a row of a joint step."""
        return self.topk is None and not self.draft

    def row(self) -> Row:
        """It as a row of a joint step; `take` must follow."""
        return Row(self.session.engine, self.token, len(self.session.ids))

    def take(self, logits: Logits) -> None:
        """The logits [V] of the joint step that ran it."""
        self.session.accept(self.token)
        self.rows = logits[None]
