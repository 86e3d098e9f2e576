"""/tokenize, /detokenize and /apply-template: token ids of texts and back, in the forms of vLLM and of llama.cpp.

Both call the paths the same and the fields otherwise: vLLM has `prompt` or `messages` and answers `tokens`, `count`;
llama.cpp has `content` and answers `tokens`. An answer has the fields of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field

from merino_edge import limits
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.server.chat_request import ChatRequest
from merino_edge.runtime.server.requests import parse
from merino_edge.runtime.server.strict import Checked, FieldError
from merino_edge.runtime.server.worker import Busy
from merino_edge.runtime.token_bytes import TokenBytes
from merino_edge.tokenizer import Tokenizer


class TokenizeText(Checked):
    """A text: `prompt` is vLLM's name of it, `content` llama.cpp's."""

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = True  # vLLM's, the beginning-of-text token
    add_special: bool = False  # llama.cpp's
    parse_special: bool = True  # llama.cpp's; only true is served
    return_token_strs: bool = False  # vLLM's
    with_pieces: bool = False  # llama.cpp's

    def check(self) -> None:
        if (self.prompt is None) == (self.content is None):
            raise FieldError("prompt", "give one of prompt, content and messages")
        if not self.parse_special:
            raise FieldError("parse_special", "only true is served", "unsupported_value")


class TokenizeChat(ChatRequest):
    """A conversation, as in a chat."""

    return_token_strs: bool = False
    add_special_tokens: bool = False  # of no effect: the template writes them


class Detokenize(Checked):
    model: str = ""
    tokens: Annotated[list[int], Field(max_length=limits.MAX_PROMPT_BYTES)]


class TokensApi:
    """Answers the paths of one tokenizer."""

    paths = ("/tokenize", "/detokenize", "/apply-template")
    most_at_once = 8  # requests that wait for their turn: they share threads and memory with answers

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: TokenBytes,
        engine: Engine,
        template_options: Mapping[str, Any],
        *,
        control_tokens: bool,
    ) -> None:
        self._tokenizer, self._options, self._control_tokens = tokenizer, template_options, control_tokens
        self._context, self._vocab_size = engine.max_positions, engine.vocab_size
        self._bytes, self._waiting = tokens, 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that wait. Use it from one thread. Raises Busy."""
        if self._waiting >= self.most_at_once:
            raise Busy(f"{self._waiting} texts wait to be tokenised")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def answer(self, path: str, body: bytes, check_name: Callable[[str], None]) -> dict[str, Any]:
        """The document that answers a request. `check_name` refuses another model. Raises InputError."""
        if path == "/detokenize":
            detokenize = parse(Detokenize, body)
            check_name(detokenize.model) if detokenize.model else None
            return self._text(detokenize.tokens)
        if path == "/apply-template" or b'"messages"' in body:
            chat = parse(TokenizeChat, body)
            check_name(chat.model) if chat.model else None
            ids = self._prompt(chat)
            if path == "/apply-template":
                return {"prompt": self._tokenizer.decode(ids, skip_special_tokens=False)}
            return self._ids(ids, strings=chat.return_token_strs)
        request = parse(TokenizeText, body)
        check_name(request.model) if request.model else None
        if request.prompt is not None:
            ids, special = self._tokenizer.encode(request.prompt), request.add_special_tokens
        else:
            ids, special = self._tokenizer.encode(request.content or ""), request.add_special
        if not special and self._tokenizer.chat.bos_token_id is not None:
            ids = ids[1:]
        document = self._ids(ids, strings=request.return_token_strs)
        if request.with_pieces:
            document["tokens"] = [{"id": i, "piece": self._piece(i)} for i in ids]
        return document

    def _prompt(self, chat: TokenizeChat) -> list[int]:
        return chat.prompts(self._tokenizer, control_tokens=self._control_tokens, options=self._options)[0]

    def _ids(self, ids: Sequence[int], *, strings: bool) -> dict[str, Any]:
        texts = [self._bytes.text_of(i) for i in ids] if strings else None
        return {"count": len(ids), "max_model_len": self._context, "tokens": list(ids), "token_strs": texts}

    def _piece(self, token: int) -> str | list[int]:
        """A token's text, or its bytes where they are only a part of a character."""
        data = self._bytes.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return list(data)

    def _text(self, ids: Sequence[int]) -> dict[str, Any]:
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise FieldError("tokens", f"ids outside 0 to {self._vocab_size - 1}")
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return {"prompt": text, "content": text}
