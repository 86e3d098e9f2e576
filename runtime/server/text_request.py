"""The request to /v1/completions: one prompt or several, as texts or as token ids.

Source: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from merino_edge import limits
from merino_edge.runtime.logprobs import LogprobRecorder
from merino_edge.runtime.server.requests import Request
from merino_edge.runtime.server.strict import FieldError
from merino_edge.tokenizer import Tokenizer

Prompts = Annotated[list[str | list[int]] | list[int], Field(min_length=1)]


class TextRequest(Request):
    """A request to /v1/completions."""

    prompt: str | Prompts
    echo: bool = False
    logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.logprobs is not None and not 0 <= self.logprobs <= limits.MAX_LOGPROBS:
            raise FieldError("logprobs", f"outside 0 to {limits.MAX_LOGPROBS}")
        if len(self._prompts) * self.n > limits.MAX_CHOICES:
            raise FieldError("prompt", f"more than {limits.MAX_CHOICES} answers in all; see merino_edge/limits.py")
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "0 only with echo")

    @property
    def continues(self) -> bool:
        return True

    def prompts(
        self, tokenizer: Tokenizer, *, control_tokens: bool = False, options: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        if not all(self._prompts):
            raise FieldError("prompt", "empty; give at least one character")
        return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self._prompts]

    def recorder(self) -> LogprobRecorder | None:
        if self.logprobs is None and self.token_limit:
            return None
        return LogprobRecorder(self.logprobs or 0, of_prompt=self.echo)

    @property
    def top(self) -> int | None:
        return self.logprobs

    def echoed(self, tokenizer: Tokenizer, number: int) -> str:
        prompt = self._prompts[number] if self.echo else ""
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)

    @property
    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]
