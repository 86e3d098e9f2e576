"""The budget of one rendering of a chat template: how many steps it takes and how many characters it makes.

What a filter, a method or an operator would make is weighed before it is made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

from merino_edge import limits

LARGEST_NUMBER = 1_000_000  # among the arguments of a call, such as a width or a count
MOST_BITS = 4096  # of a whole number
ELEMENT = 16  # what an element of a container weighs, at least, in characters
STEPS_BETWEEN_CLOCKS = 16
TEXTS = (str, bytes)
VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
SIZED: Any = (*TEXTS, *VIEWS, list, tuple, dict, set, frozenset)
NUMBERS, FIELD = re.compile(r"\d+"), re.compile(r"%(?:\([^)]*\))?[^%a-zA-Z]*|\{[^}]*")  # of a formatted text
WIDTH_BY_ARGUMENT = re.compile(r"%[^%a-zA-Z]*\*|\{[^}]*\{")
HUGE = 2**60
FROM_THE_RIGHT = ("rfind", "rindex", "rsplit", "rpartition")  # Python searches these by the square of the lengths
MOST_COMPARISONS = 10**8
JSON_GROWTH = 12  # characters that JSON may write for one


class TooMuch(Exception):
    """The template goes beyond a limit. The text says which."""


class Budget:
    """Counts the steps and the characters of one rendering. Its methods raise TooMuch."""

    def __init__(self) -> None:
        self._steps = self._made = 0
        self._end = time.thread_time() + limits.MAX_TEMPLATE_SECONDS
        # The weight of each container, which no template can change. It is kept, so that its id stays its own.
        self._weights: dict[int, tuple[Any, int]] = {}

    def step(self) -> None:
        self._steps += 1
        if self._steps > limits.MAX_TEMPLATE_STEPS:
            raise TooMuch(f"it takes more than {limits.MAX_TEMPLATE_STEPS} steps")
        if self._steps % STEPS_BETWEEN_CLOCKS == 0 and time.thread_time() > self._end:
            raise TooMuch(f"it takes more than {limits.MAX_TEMPLATE_SECONDS:.0f} s")

    def made(self, value: Any) -> Any:
        """`value`, which the template has just made."""
        self.require(self.weight(value))
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise TooMuch(f"it makes a number of more than {MOST_BITS} bits")
        if isinstance(value, SIZED):  # what is in a container was counted when it was made itself
            self._made += len(value) * (1 if isinstance(value, TEXTS) else ELEMENT)
        if self._made > limits.MAX_TEMPLATE_MADE:
            raise TooMuch(f"it makes more than {limits.MAX_TEMPLATE_MADE} characters")
        return value

    def require(self, characters: float) -> None:
        """Refuse a value of this weight."""
        if characters > limits.MAX_TEMPLATE_VALUE:
            raise TooMuch(f"it makes a value of more than {limits.MAX_TEMPLATE_VALUE} characters")

    def weight(self, value: Any) -> int:
        """The characters that `value` takes when it is printed, about: what is in it twice counts twice."""
        if isinstance(value, TEXTS):
            return ELEMENT + len(value)
        if not isinstance(value, SIZED):
            return ELEMENT
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        total = ELEMENT
        for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            if isinstance(part, Namespace):  # it can change, so it has no weight
                raise TooMuch("it puts a namespace into a list")
            total += self.weight(part)
            self.require(total)
        self._weights[id(value)] = value, total
        return total

    def drained(self, value: Any) -> Any:
        """An iterator whose elements are weighed together, as whoever takes them all would hold them."""
        if not isinstance(value, Iterator) or isinstance(value, LoopContext):
            return value
        return iter(self.made(list(islice(value, limits.MAX_TEMPLATE_VALUE // ELEMENT))))

    def filter(self, name: str, own: Any, others: list[Any]) -> None:
        """Refuse a filter of `own` whose result would be too large."""
        self.require(sum(map(self.weight, [own, *others])))
        if isinstance(own, Namespace):
            raise TooMuch(f"{name} gets a namespace")
        largest, texts = _largest_number(name, others), [value for value in others if isinstance(value, TEXTS)]
        if name == "tojson":
            between = [text for value in others if isinstance(value, (tuple, list)) for text in value]  # separators
            self.require(self.weight(own) * max(largest, *map(_length, [*texts, *between]), JSON_GROWTH))
        elif name == "indent":
            self.require(self.weight(own) + (str(own).count("\n") + 1) * max(largest, *map(len, texts), 4))
        elif name == "join" and isinstance(own, SIZED):
            self.require(self.weight(own) + len(own) * sum(map(len, texts)))
        elif name == "replace" and len(texts) > 1:
            self._replace(str(own), str(texts[0]), str(texts[1]))
        elif name == "format":
            self._format(str(own), others)
        elif name == "sum" and any(isinstance(value, SIZED) and not isinstance(value, TEXTS) for value in others):
            raise TooMuch("it sums lists")

    def method(self, name: str, own: str | bytes | int, others: list[Any]) -> None:
        """Refuse a call of a method of `own` whose result would be too large."""
        largest = _largest_number(name, others)
        if isinstance(own, int):
            return
        if name == "join" and others and isinstance(others[0], SIZED):
            self.require(self.weight(others[0]) + len(others[0]) * len(own))
        elif name == "replace" and len(others) > 1:
            self._replace(own, others[0], others[1])
        elif name == "expandtabs":
            self.require(len(own) * max(largest, 8))
        elif name in ("format", "format_map"):
            self._format(str(own), others)
        elif name in ("translate", "maketrans"):
            raise TooMuch(f"{name} is not for chat templates")
        elif name in FROM_THE_RIGHT and len(own) * max(map(_length, others), default=0) > MOST_COMPARISONS:
            raise TooMuch(f"{name} looks for a long text in a long text")

    def operator(self, name: str, left: Any, right: Any) -> None:
        """Refuse an operator whose result would be too large."""
        if name == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, SIZED) and isinstance(count, int):
                    self.require(self.weight(value) * count)
        if name == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MOST_BITS:
                raise TooMuch(f"it makes a number of more than {MOST_BITS} bits")
        elif name == "%" and isinstance(left, TEXTS):
            self._format(str(left), list(right) if isinstance(right, tuple) else [right])

    def _replace(self, text: str | bytes, old: Any, new: Any) -> None:
        if isinstance(old, type(text)) and isinstance(new, type(text)):  # else Python refuses
            count = text.count(old) if old else len(text) + 1  # type: ignore[arg-type]
            self.require(len(text) + count * len(new))

    def _format(self, pattern: str, arguments: list[Any]) -> None:
        """Each field of a pattern can be as wide as its width or its value; a width can be an argument."""
        if any(isinstance(value, Namespace) for value in arguments):
            raise TooMuch("it formats a namespace")
        fields = FIELD.findall(pattern)
        widths = [int(digits) if len(digits) < 9 else HUGE for field in fields for digits in NUMBERS.findall(field)]
        if WIDTH_BY_ARGUMENT.search(pattern):
            widths += [HUGE if isinstance(value, SIZED) else _absolute(value) for value in arguments]
        self.require(len(pattern) + len(fields) * (max(widths, default=0) + sum(map(self.weight, arguments))))


def _absolute(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, TEXTS) else 0


def _largest_number(name: str, values: list[Any]) -> int:
    """The largest whole number among arguments, such as a width or a count."""
    if (largest := max(map(_absolute, values), default=0)) > LARGEST_NUMBER:
        raise TooMuch(f"{name} gets a number over {LARGEST_NUMBER}")
    return largest
