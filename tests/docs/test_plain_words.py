"""Prose is short: lines of pages, sentences of docstrings, help texts and pages, and the README as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.plain_words import MOST_COLUMNS, long_module_docstring, long_sentences, pages_and_modules

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("merino_edge", "search", "export", "runtime", "jetson", "docs", "tests", "benchmarks")
PAGES = [
    *sorted(page.relative_to(ROOT) for page in ROOT.glob("*.md")),
    *sorted(page.relative_to(ROOT) for page in (ROOT / "docs").rglob("*.md")),
    Path("merino_edge/bundles/lamb/README.md"),
]
README_LINES = 150


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_line_is_too_wide_and_no_sentence_too_long(page: Path) -> None:
    wide = [n for n, line in enumerate((ROOT / page).read_text().splitlines(), 1) if len(line) > MOST_COLUMNS]
    assert not wide, f"{page}: lines over {MOST_COLUMNS} columns"
    assert not list(long_sentences(ROOT / page))


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_help_texts_have_short_sentences(folder: str) -> None:
    modules = [file for file in pages_and_modules(ROOT / folder) if file.suffix == ".py"]
    assert not [row for file in modules for row in long_sentences(file)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_module_docstrings_are_short(folder: str) -> None:
    modules = [file for file in pages_and_modules(ROOT / folder) if file.suffix == ".py"]
    assert not {str(file): lines for file in modules if (lines := long_module_docstring(file))}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
