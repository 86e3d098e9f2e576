"""A chat: its messages, the bundle's chat template and the KV cache they share. Knows no terminal.

Each turn puts the whole conversation through the template, and the session reuses the common prefix in the cache.
If the conversation no longer fits the context, `send` raises InputError and leaves the conversation unchanged. With
`truncate_history` it drops the oldest turns instead and says how many messages in `dropped`. The system message is
never dropped. Without a template each message is a prompt of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from merino_edge import message_content
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import Grammar
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.runtime.speculative.drafter import Proposer
from merino_edge.tokenizer import Message, Tokenizer

PROBE: Message = {"role": "user", "content": "Hello."}


class Chat:
    """A conversation with one engine.

    `sampling`, `max_tokens`, `stop`, `grammar`, `proposer` and `truncate_history` may be changed between turns.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_tokens: int = 256,
        *,
        stop: Sequence[str] | str = (),
        system: str | None = None,
        raw: bool | None = None,
        grammar: Grammar | None = None,
        proposer: Proposer | None = None,
        truncate_history: bool = False,
        control_tokens: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`raw` True bypasses the template, False insists on one, and None uses the template if there is one.

        With `control_tokens`, special tokens that a message spells out count as such. `template_options` are those of
        the template, such as enable_thinking. Raises InputError for a system message or options without a template,
        or such that the template refuses.
        """
        self.tokenizer, self.sampling, self.max_tokens, self.stop = tokenizer, sampling, max_tokens, stop
        self.grammar, self.proposer, self.truncate_history = grammar, proposer, truncate_history
        self.dropped = 0  # messages that the last question dropped from the history
        self.raw = tokenizer.chat.chat_template is None if raw is None else raw
        if self.raw and system is not None:
            raise InputError("a system message needs a chat template", "leave --system and --raw out")
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.control_tokens, self.template_options = control_tokens, template_options or {}
        if self.raw and self.template_options:
            raise InputError("options of a chat template need one", "leave --chat-template-kwargs and --raw out")
        tokenizer.check_options(self.template_options, control_tokens=control_tokens)
        # Whether the template leaves the system message out.
        self.drops_system = bool(self.system) and tokenizer.drops_system([*self.system, PROBE], self.template_options)
        self.turn: Generation | None = None  # the last answer, perhaps still running
        self._request = self.system  # the messages up to and including the last question
        self.session = Session(engine)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far. A cancelled answer is in it with its text up to then."""
        answer: list[Message] = [{"role": "assistant", "content": self.turn.text}] if self.turn else []
        return [*self._request, *answer]

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.turn, self._request = None, self.system

    def close(self) -> None:
        """Give the engine back, for another chat or session. The conversation stays, and may go on later."""
        if self.turn is not None:
            self.turn.close()
        self.session.close()

    def resume(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Go on with another conversation: its system message first, if any, then questions and answers in turns.

        Raises InputError for other orders, and what the template refuses; the conversation is then unchanged.
        """
        made = message_content.plain(messages)
        system = made[:1] if made and made[0]["role"] == "system" else []
        roles = [message["role"] for message in made[len(system) :]]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise InputError("the messages are no questions and answers in turns", "end them with an answer")
        if self.raw and made:
            raise InputError("without a chat template there is no conversation to go on with", "leave --raw out")
        if not self.raw:
            self._encode([*made, PROBE])
        self.system, self._request, self.turn, self.dropped = system, made, None, 0

    def send(self, text: str | Sequence[Mapping[str, Any]], cancel: threading.Event | None = None) -> Generation:
        """Send a question and return the answer to iterate over. Setting `cancel` ends it within one token.

        The question is a text, or parts of text as in OpenAI's API. Raises InputError where it is empty or does not
        fit, EngineInUseError where another session has the engine; the conversation is then unchanged.
        """
        text = message_content.text_of(text)
        if not text:
            raise InputError("the prompt is empty", "give at least one character")
        history: list[Message] = [] if self.raw else self.messages
        messages = [*history, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(text) if self.raw else self._encode(messages)
        request = messages
        if self.truncate_history and not self.raw:
            request, ids = self._truncated(messages, ids)
        context = self.session.engine.max_positions
        if len(ids) > context and len(history) > len(self.system) and not self.truncate_history:
            raise InputError(
                f"the conversation has {len(ids)} tokens, the context of this bundle is {context}",
                "/reset starts a new one, --slide drops the oldest turns, a larger --context of the export holds more",
            )
        with self.session.use:  # refused here, and not with the first token, where another session has the engine
            pass
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
            continues=self.raw or self.grammar is not None,  # a form counts its first space
        )
        self._request, self.dropped = request, len(messages) - len(request)
        return self.turn

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode_chat(messages, control_tokens=self.control_tokens, options=self.template_options)

    def _truncated(self, messages: list[Message], ids: list[int]) -> tuple[list[Message], list[int]]:
        """The messages and their ids, without the oldest turns if they leave too little room for an answer."""
        context, system = self.session.engine.max_positions, len(self.system)
        if len(ids) + min(self.max_tokens, context // 4) <= context:
            return messages, ids
        # After a drop, all that follows must run again. Dropping down to half the context makes that rare.
        while len(ids) > context // 2 and len(messages) > system + 1:
            messages = [*self.system, *messages[system + 2 :]]  # without the oldest question and its answer
            ids = self._encode(messages)
        return messages, ids
