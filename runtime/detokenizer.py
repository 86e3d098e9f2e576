"""Token ids in, text out, piece by piece: never half a UTF-8 character nor the start of a stop string.

The pieces joined are the decoded text of all ids, cut before the first stop string. Of two stop strings
the one that ends first counts, and of those the longer. Knows no model.

(`tokenizers.DecodeStream` cannot be flushed, so an answer that ends inside a character loses its tail.)
"""

from __future__ import annotations

from collections.abc import Sequence

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.tokenizer import Tokenizer

WINDOW = 8  # ids from which on the window is cut, each time for one more decoding
INCOMPLETE = "\ufffd"  # how an unfinished (or invalid) byte sequence decodes


class StreamingDetokenizer:
    """One answer's text. `text` is what was given out so far; `stopped` turns true at a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if len(stop) > limits.MAX_STOP_STRINGS:
            raise InputError(f"{len(stop)} stop strings, the limit is {limits.MAX_STOP_STRINGS}", "give fewer")
        if "" in stop:
            raise InputError("a stop string is empty", "give at least one character")
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # A window over the ids: some of those given out, because some decoders treat the first id differently, then
        # those not yet given out. `_taken` characters of the window's text are given out.
        self._window: list[int] = []
        self._complete = 0  # ids in the window when it was last cut: they ended with a character
        self._taken = 0
        self._held = ""  # decoded, but perhaps the start of a stop string

    def push(self, token: int) -> str:
        """Add one id and return the text that is certain now, often empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = text.rstrip(INCOMPLETE)
        fresh = certain[self._taken :]
        self._taken = max(self._taken, len(certain))
        if len(self._window) >= WINDOW and fresh and certain == text:
            self._window = self._window[self._complete :]
            self._complete = len(self._window)
            self._taken = len(self._tokenizer.decode(self._window))
        return self._release(fresh, final=False)

    def finish(self) -> str:
        """The rest: an unfinished character as U+FFFD, and text that turned out to be no stop string."""
        fresh = self._tokenizer.decode(self._window)[self._taken :]
        self._window, self._complete, self._taken = [], 0, 0
        return self._release(fresh, final=True)

    def _release(self, fresh: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + fresh
        matches = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if matches:
            self.stopped = True
            piece, held = held[: min(matches)[1]], ""
        else:
            keep = 0 if final else max((_overlap(held, stop) for stop in self._stop), default=0)
            piece, held = held[: len(held) - keep], held[len(held) - keep :]
        self._held = held
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
