"""A conversation: messages, the bundle's template and the cache they share. Knows no terminal.

Every turn sends the whole conversation through the template; the session finds what is in the cache
already. When the conversation no longer fits the context, `send` refuses with InputError and keeps the
conversation as it was, or with `slide` drops its oldest turns and says how many in `dropped`; nothing is dropped
silently, and the system message never. Without a template each message is a prompt of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import Grammar
from merino_edge.runtime.sampling import Sampling
from merino_edge.runtime.session import Session
from merino_edge.runtime.speculative.drafter import Proposer
from merino_edge.tokenizer import Message, Tokenizer


class Chat:
    """`sampling`, `max_tokens`, `stop`, `grammar`, `proposer` and `truncate_history` may be changed between turns."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_tokens: int = 256,
        *,
        stop: Sequence[str] = (),
        system: str | None = None,
        raw: bool | None = None,
        grammar: Grammar | None = None,
        proposer: Proposer | None = None,
        truncate_history: bool = False,
    ) -> None:
        """`raw` True bypasses the template, False insists on one, None uses one if there is one."""
        self.tokenizer, self.sampling, self.max_tokens, self.stop = tokenizer, sampling, max_tokens, stop
        self.grammar, self.proposer, self.truncate_history = grammar, proposer, truncate_history
        self.dropped = 0  # messages that the last question left behind
        self.raw = tokenizer.chat.chat_template is None if raw is None else raw
        if self.raw and system is not None:
            raise InputError("a system message needs a chat template", "leave --system and --raw out")
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.turn: Generation | None = None  # the last answer, perhaps still running
        self._asked = self.system  # the conversation up to and including the last question
        self.session = Session(engine)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; an answer cut short counts with what was made of it."""
        answer: list[Message] = [{"role": "assistant", "content": self.turn.text}] if self.turn else []
        return [*self._asked, *answer]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turn, self._asked = None, self.system

    def send(self, text: str, cancel: threading.Event | None = None) -> Generation:
        """Ask, and return the answer to iterate over. Raises InputError; the conversation is then unchanged."""
        if not text:
            raise InputError("the prompt is empty", "give at least one character")
        before: list[Message] = [] if self.raw else self.messages
        asked = [*before, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(text) if self.raw else self.tokenizer.encode_chat(asked)
        kept = asked
        if self.truncate_history and not self.raw:
            kept, ids = self._truncated(asked, ids)
        context = self.session.engine.max_positions
        if len(ids) > context and len(before) > len(self.system) and not self.truncate_history:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the context of this bundle is {context}",
                "/reset starts a new one, --slide drops the oldest turns, a larger --context of the export holds more",
            )
        self.turn = generate(
            self.session,
            self.tokenizer,
            ids,
            self.sampling,
            self.max_tokens,
            stop=self.stop,
            cancel=cancel,
            grammar=self.grammar,
            proposer=self.proposer,
        )
        self._asked, self.dropped = kept, len(asked) - len(kept)
        return self.turn

    def _truncated(self, asked: list[Message], ids: list[int]) -> tuple[list[Message], list[int]]:
        """Without the oldest turns where they leave too little room for an answer; and its ids."""
        context, system = self.session.engine.max_positions, len(self.system)
        if len(ids) + min(self.max_tokens, context // 4) <= context:
            return asked, ids
        # What is dropped makes everything behind it run again: down to a half, so that this happens seldom.
        while len(ids) > context // 2 and len(asked) > system + 1:
            asked = [*self.system, *asked[system + 2 :]]  # a question and its answer less
            ids = self.tokenizer.encode_chat(asked)
        return asked, ids
