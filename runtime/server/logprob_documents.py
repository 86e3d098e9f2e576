"""Log-probabilities in OpenAI's two forms: that of chats and that of completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from merino_edge.runtime.logprobs import TokenLogprob
from merino_edge.runtime.token_bytes import TokenBytes, text_of


def of_chat(entries: Sequence[TokenLogprob], tokens: TokenBytes, top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: each token with its bytes, and the `top` most likely ones."""

    def document(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokens.bytes_of(token)
        return {"token": text_of(data), "logprob": logprob, "bytes": list(data)}

    content = [
        {**document(entry.token, entry.logprob), "top_logprobs": [document(*likely) for likely in entry.top[:top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def of_text(entries: Sequence[TokenLogprob], tokens: TokenBytes, offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. `offset` is the number of characters before the first token.

    The most likely tokens always include the token itself. A prompt's first token has none.
    """
    texts = [tokens.text_of(entry.token) for entry in entries]
    offsets = list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else []
    likely: list[dict[str, float] | None] = []
    for entry, text in zip(entries, texts, strict=True):
        if entry.logprob is None:
            likely.append(None)
            continue
        found: dict[str, float] = {}
        for token, logprob in entry.top:
            found.setdefault(tokens.text_of(token), logprob)  # the likelier of two with one text
        found.setdefault(text, entry.logprob)
        likely.append(found)
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": likely,
        "text_offset": offsets,
    }
