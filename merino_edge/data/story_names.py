"""Whether a toy story keeps its names: a model that is too small or too new forgets who the story is about.

A story of `tiny_stories` has a hero, who is named first, and a friend. Both are named again, and nobody else is named.
"""

from __future__ import annotations

import re
from collections import Counter

from merino_edge.data.tiny_stories import NAMES

EVERY_NAME = re.compile(rf"\b(?:{'|'.join(name for names in NAMES.values() for name in names)})\b")
CHARACTERS = 2


def names_in(text: str) -> Counter[str]:
    """How often each name of the toy stories stands in `text`, in the order of the text."""
    return Counter(EVERY_NAME.findall(text))


def keeps_names(story: str) -> bool:
    """Whether the whole `story` is about one hero and one friend, each of them named again."""
    counts = names_in(story)
    return len(counts) == CHARACTERS and min(counts.values()) > 1
