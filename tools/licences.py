"""Writes docs/licences.md: the licence of every package that constraints.txt pins, as its own metadata says it.

    .venv/bin/python tools/licences.py          of the packages that are installed beside this Python

A package that is not installed here keeps its line. So run it where everything is installed (`make test`).
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/licences.md"
HEAD = """# Licences

merino-edge itself has the Apache-2.0 licence. It contains no code of the packages below: pip installs them.
Each licence is what the package says of itself. The extras in `pyproject.toml` say which of them are installed.

`python tools/licences.py` writes this table, of the packages that `constraints.txt` pins.

| package | licence |
|---|---|
"""
LONGEST = 60  # characters; some packages put a whole licence there


def main() -> None:
    """Write the page. Raises SystemExit for a package whose licence is nowhere."""
    known = dict(re.findall(r"^\| ([\w.-]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)) if PAGE.exists() else {}
    pins = (ROOT / "constraints.txt").read_text()
    names = sorted(set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)))
    found = {name: licence(name) or known.get(name, "") for name in names}
    if missing := [name for name, text in found.items() if not text]:
        raise SystemExit(
            f"licences: nothing says the licence of {', '.join(missing)}; add a line to {PAGE.name} by hand"
        )
    PAGE.write_text(HEAD + "".join(f"| {name} | {text} |\n" for name, text in found.items()))


def licence(name: str) -> str:
    """What an installed package says of its licence, in one line; empty where it says nothing."""
    try:
        fields = metadata(name)
    except PackageNotFoundError:
        return ""
    if expression := fields.get("License-Expression"):
        return str(expression)
    classified = [
        text.rpartition(" :: ")[2] for text in fields.get_all("Classifier") or () if text.startswith("License")
    ]
    written = (fields.get("License") or "").strip().partition("\n")[0]  # some put the whole text there
    return ", ".join(text for text in classified if text != "OSI Approved") or (
        written if len(written) <= LONGEST else ""
    )


if __name__ == "__main__":
    main()
