"""Names that a person types: found in any capitals, and the nearest one offered where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

MOST_BESIDE = 2000  # names of a folder that are compared
LONGEST = 200  # characters of a name that are compared; the time grows with their square
LIKE, LIKE_A_FILE = 0.6, 0.8  # how much alike; files of one folder are often alike in part


def find(given: object, known: Iterable[str]) -> str | None:
    """The one of `known` that is `given` but for capitals; None where there is none."""
    return next((name for name in known if name.lower() == str(given).lower()), None)


def choose(given: object, known: Iterable[str], more: str = "") -> str:
    """The hint to a name that is not known: the nearest one, and all. `more` says what else may be given."""
    every = list(known)
    every_name = f"choose one of {', '.join(every)}{more}"
    nearest = near(given, every)
    return f"did you mean {nearest}? {every_name}" if nearest else every_name


def near(given: object, known: Iterable[str], alike: float = LIKE) -> str | None:
    """The one of `known` that looks most like `given`; None where none does."""
    if not isinstance(given, str):
        return None
    by_lower = {name.lower(): name for name in known}
    found = get_close_matches(given[:LONGEST].lower(), by_lower, 1, alike)
    return by_lower[found[0]] if found else None


def beside(path: Path) -> str:
    """The hint to a path where nothing is: the file or folder beside it with the nearest name; else empty."""
    try:
        with os.scandir(path.parent) as entries:
            found = near(path.name, [entry.name for entry in islice(entries, MOST_BESIDE)], LIKE_A_FILE)
    except (OSError, ValueError):
        return ""
    return f"did you mean {path.with_name(found)}?" if found else ""


def is_missing(path: Path) -> bool:
    """Whether nothing is at `path`. What cannot be looked at is not missing."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return not path.is_symlink()
    except (OSError, ValueError):
        return False
    return False
