"""Streaming detokenizer: token ids in, pieces of text out.

A piece never ends inside a UTF-8 character and never contains the beginning of a stop string. The joined pieces are
the decoded text of all ids, cut before the first stop string, the model's own among them. If two stop strings are
found, the one that ends first counts, and among those the longer one. Knows no model. A character that was returned
stays where bytes behind it make none; decoded as a whole, SentencePiece's would lose it too.

(`tokenizers.DecodeStream` cannot be flushed, so an answer that ends inside a character would lose its tail.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.tokenizer import INCOMPLETE, Tokenizer

WINDOW = 8  # ids; a longer window is cut, which takes one more decoding
LONGEST = 64  # ids of a window; more of them without a complete character will never make one


class StreamingDetokenizer:
    """The text of one answer. `text` is what was returned so far. `stopped` becomes true at a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = (), *, show_special: bool = False
    ) -> None:
        """With `prompt` the answer continues its text, so a first space stays that some decoders leave out.

        `show_special`: special tokens are part of the text, as those that begin a tool call.
        Raises InputError where there are too many stop strings or one is empty.
        """
        if len(stop) > limits.MAX_STOP_STRINGS:
            raise InputError(f"{len(stop)} stop strings, the limit is {limits.MAX_STOP_STRINGS}", "give fewer")
        if "" in stop:
            raise InputError("a stop string is empty", "give at least one character")
        self.text = ""
        self.stopped = False
        self._decode = partial(tokenizer.decode, skip_special_tokens=not show_special)
        self._stop = (*stop, *tokenizer.chat.stop_strings)
        # Only a window of the ids is decoded each time. It begins with some ids whose text was returned already,
        # because some decoders treat the first id differently. `_returned` counts the characters of those.
        self._window, before = tokenizer.last_ids(prompt)
        if show_special:
            before = self._decode(self._window)
        # Ids in the window when it was last cut; their text ends with a complete character.
        self._complete, self._returned = len(self._window), len(before)
        self._text = before  # of the window
        self._held = ""  # decoded, but held back: it may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Append one id and return the text that is certain now, often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text == self._text and not text.endswith(INCOMPLETE) and not self._decode([token, token]):
            self._window.pop()  # a control token: thousands of them would be decoded each time
            return ""
        self._text = text
        certain = text.rstrip(INCOMPLETE)
        if len(self._window) > LONGEST and certain != text:
            fresh, self._window = text[self._returned :], self._window[-1:]
            self._text = self._decode(self._window)
            self._complete, self._returned = 1, len(self._text)
            return self._release(fresh, final=False)
        fresh = certain[self._returned :]
        self._returned = max(self._returned, len(certain))
        if len(self._window) >= WINDOW and fresh and certain == text:
            self._window = self._window[self._complete :]
            self._complete = len(self._window)
            self._text = self._decode(self._window)
            self._returned = len(self._text)
        return self._release(fresh, final=False)

    def finish(self) -> str:
        """Return the rest: an unfinished character as U+FFFD, and text held back for a stop string."""
        fresh = self._decode(self._window)[self._returned :]
        self._window, self._complete, self._returned, self._text = [], 0, 0, ""
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
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
