"""Rounds: how the answers that run take turns. Each round runs a piece of one prompt, and one token of every answer.

So a newcomer waits for one step, and others go on while its prompt runs. Of several prompts the shortest rest comes
first, and every second time the oldest, so that none waits for ever. Knows no thread and no queue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge.runtime.generation import Generation
from merino_edge.runtime.session import Session
from merino_edge.runtime.shared_sessions import SharedSessions
from merino_edge.runtime.turns import PromptPiece, Step


@dataclass(eq=False)
class _Running:
    generation: Generation
    on_piece: Callable[[str], None]
    on_end: Callable[[Exception | None], None]
    session: Session
    event: Step | PromptPiece

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that have not run."""
        ids = self.generation.prompt_ids
        return len(ids) - self.session.first_to_run(ids)


class Rounds:
    """The answers that run, in the order of their arrival. Use it from one thread."""

    def __init__(self, sessions: SharedSessions) -> None:
        self._sessions = sessions
        self._running: list[_Running] = []
        self._rounds = 0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def room(self) -> int:
        """How many more answers may begin."""
        return self._sessions.free

    def begin(
        self,
        generation: Generation,
        on_piece: Callable[[str], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        """Begin an answer. `on_piece` gets each piece of text, `on_end` what ended it: None, or an error."""
        session = self._sessions.take(generation.prompt_ids)
        generation.use(session)
        self._running.append(one := _Running(generation, on_piece, on_end, session, PromptPiece()))
        self._advance(one)  # up to its first piece, which does not run yet

    def run(self) -> None:
        """Run one round."""
        prompts = [one for one in self._running if isinstance(one.event, PromptPiece)]
        if prompts:
            self._rounds += 1
            self._advance(prompts[0] if self._rounds % 2 else min(prompts, key=lambda one: one.prompt_left))
        waiting = {one.event: one for one in self._running if isinstance(one.event, Step)}
        for steps in self._sessions.together(waiting):
            try:
                self._sessions.run(steps)
            except BaseException as error:
                for step in steps:
                    self._end(waiting[step], error)
            else:
                for step in steps:
                    self._advance(waiting[step])

    def _advance(self, one: _Running) -> None:
        """Let an answer go on until it waits again, or ends."""
        try:
            while (event := one.generation.advance()) is not None:
                if not isinstance(event, str):
                    one.event = event
                    return
                one.on_piece(event)
        except BaseException as error:
            self._end(one, error)
        else:
            self._end(one, None)

    def _end(self, one: _Running, error: BaseException | None) -> None:
        """Free the answer's session and tell of its end. An error concerns this answer only: the others still run."""
        if error is not None and not isinstance(error, Exception):  # a panic, say: it must not end the thread either
            error = RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(BaseException):
            one.generation.close()
        self._running.remove(one)
        self._sessions.give_back(one.session)
        with contextlib.suppress(BaseException):  # the loop that it tells may be gone
            one.on_end(error)
