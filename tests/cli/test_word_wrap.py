"""Answers on a terminal are broken between words, however they come, and nothing else is changed."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from merino_edge.cli.word_wrap import WordWrap

PART = "The quick  brown fox jumps.\n\n- over\tthe lazy dog, 日本語は空白がない and an_endless_word_of_one_line 🦊 "
TEXT = PART * 4


@pytest.mark.parametrize("columns", [12, 25, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_lines_fit_and_the_words_stay(columns: int, seed: int) -> None:
    rng, wrap, made, at = random.Random(seed), WordWrap(lambda: columns), "", 0
    while at < len(TEXT):
        size = rng.randrange(1, 9)
        made += wrap.push(TEXT[at : at + size])
        at += size
    made += wrap.finish()
    whole = WordWrap(lambda: columns)
    assert made == whole.push(TEXT) + whole.finish()
    assert "".join(made.split()) == "".join(TEXT.split())
    assert [word for word in made.split() if word.isascii()] == [word for word in TEXT.split() if word.isascii()]
    for line in made.split("\n"):
        assert cell_len(line.expandtabs()) <= columns or " " not in line.strip()
    assert max(cell_len(line) for line in made.split("\n")) > columns // 2
    assert WordWrap(lambda: 10_000).push(TEXT + " ") == TEXT + " "


def test_a_word_is_shown_when_it_is_whole() -> None:
    wrap = WordWrap(lambda: 10)
    assert [wrap.push(piece) for piece in ("The qu", "ick", " br", "own\n", "fox")] == [
        "The ",
        "",
        "quick ",
        "\nbrown\n",
        "",
    ]
    assert wrap.finish() == "fox"
