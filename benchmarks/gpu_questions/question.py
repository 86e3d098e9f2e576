"""A question to a GPU and its answer. A question never raises where it is asked by `answered`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from merino_edge.errors import MissingExtraError

YES, NO, NOT_HERE = "yes", "no", "not here"


class Answer(NamedTuple):
    """`answer` is YES, NO, a figure, or NOT_HERE: a package or a program is missing."""

    answer: str | float
    detail: str


class Question(NamedTuple):
    """`seconds` is the most that it may take, in a process of its own."""

    name: str
    ask: Callable[[], Answer]
    seconds: float = 60.0


class NotHere(Exception):
    """What a question needs is not installed."""


def judged(wrong: Sequence[str], right: str) -> Answer:
    """NO where anything was wrong, else YES with what was right."""
    return Answer(NO, "; ".join(wrong)) if wrong else Answer(YES, right)


def answered(question: Question) -> dict[str, Any]:
    """The line of a question, asked in this process: {"question", "answer", "detail", "seconds"}."""
    began = time.perf_counter()
    try:
        answer = question.ask()
    except (NotHere, MissingExtraError, ImportError) as missing:
        answer = Answer(NOT_HERE, one_line(str(missing)))
    except Exception as error:  # whatever a driver or a library gives: it is the answer
        answer = Answer(NO, one_line(f"{type(error).__name__}: {error}"))
    return line(question.name, answer, time.perf_counter() - began)


def line(name: str, answer: Answer, seconds: float) -> dict[str, Any]:
    """A question's line, as it is printed."""
    return {"question": name, "answer": answer.answer, "detail": answer.detail, "seconds": round(seconds, 2)}


def one_line(text: str, most: int = 600) -> str:
    """`text` without line breaks, and not too long."""
    return " ".join(text.split())[:most]
