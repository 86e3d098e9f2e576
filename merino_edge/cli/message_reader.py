"""Reads the messages of a chat from the terminal: line editing, completion of commands, several lines as one message.

Python's `readline` does the editing. With GNU's, text that is pasted is one message, line breaks and all, until Enter.
Elsewhere (libedit has no bracketed paste) a message of several lines stands between two `\"""`, or its lines end
with a backslash.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

QUOTES = '"""'
GNU = "GNU readline"


class MessageReader:
    """Reads one message after the other. `complete` gives the words that may follow what is typed."""

    def __init__(self, complete: Callable[[str], Sequence[str]]) -> None:
        self._complete, self._found = complete, list[str]()
        with suppress(ImportError):
            import readline

            readline.set_completer(self._candidate)
            readline.set_completer_delims(" \t\n=")
            if GNU in (readline.__doc__ or ""):
                if os.environ.get("TERM", "dumb") != "dumb":
                    readline.parse_and_bind("set enable-bracketed-paste on")
                readline.parse_and_bind("tab: complete")
            else:
                readline.parse_and_bind("bind ^I rl_complete")

    def read(self) -> str:
        """The next message. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        text = self._line("> ")
        if text.startswith(QUOTES):
            text = text[len(QUOTES) :]
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + self._line(". ")
            return text.rstrip()[: -len(QUOTES)]
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._line(". ")
        return text.strip()

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)  # stdout is a file, which gets only the answers
        sys.stderr.flush()
        return input()

    def _candidate(self, word: str, number: int) -> str | None:
        import readline

        if number == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            self._found = [found for found in self._complete(line) if found.startswith(word)]
        return self._found[number] if number < len(self._found) else None
