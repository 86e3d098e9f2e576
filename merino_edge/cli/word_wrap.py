"""A text that comes in pieces, broken between words at a terminal's width. A word is held back until it is whole."""

from __future__ import annotations

from collections.abc import Callable

LONGEST_HELD = 200  # characters of a word: base64 and the like go on as they come


class WordWrap:
    """Breaks lines of at most `columns()` cells; wide characters have two. Other than line breaks nothing changes."""

    def __init__(self, columns: Callable[[], int]) -> None:
        """`columns` is asked for each word, since a window changes its size."""
        self._columns = columns
        self._word, self._column = "", 0

    def push(self, piece: str) -> str:
        """What can be written now."""
        made = []
        for character in piece:
            if character.isspace():
                made += [self._placed(), self._space(character)]
            else:
                self._word += character
                if len(self._word) >= LONGEST_HELD or _cells(character) == 2:  # such scripts have no spaces
                    made.append(self._placed())
        return "".join(made)

    def finish(self) -> str:
        """The last word."""
        return self._placed()

    def _placed(self) -> str:
        word, self._word = self._word, ""
        width = _cells(word)
        if not word:
            return ""
        breaks = self._column > 0 and self._column + width > self._columns()
        self._column = (0 if breaks else self._column) + width
        return f"\n{word}" if breaks else word

    def _space(self, character: str) -> str:
        if character == "\n":
            self._column = 0
        else:
            self._column += 8 - self._column % 8 if character == "\t" else 1
            if self._column > self._columns():
                self._column = 0
                return "\n"
        return character


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
