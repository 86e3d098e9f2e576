"""Sentences of docstrings, help texts and pages, so that a test can say which are too long.

python tests/helpers/plain_words.py [PATH ...]    lists them, longest first
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

MOST_WORDS = 25  # of a sentence; about 20 is the aim
MOST_MODULE_LINES = 12  # of prose at a module's top; artefact forms, indented, and tables do not count
MOST_COLUMNS = 160  # of a line in a page


def sentences(prose: str) -> Iterator[str]:
    """The sentences of `prose`: blocks of code, tables, headings and links' addresses left out."""
    text = re.sub(r"^```.*?^```", "\n", prose, flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # a link's address
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    kept = []
    for line in text.splitlines():
        bare = line.strip()
        if re.match(r" {4,}\S|\t", line) or bare.startswith(("|", "#", "===", "!!!", ":::", "---")) or not bare:
            kept.append("\n")
            continue
        kept.append(re.sub(r"^([-*]|\d+\.)\s+", "\n\n", bare) + " ")
    for paragraph in re.split(r"\n\s*\n?", "".join(kept)):
        paragraph = re.sub(r"`[^`]*`", "CODE", paragraph)
        yield from (part.strip() for part in re.split(r"(?<=[.!?:;])\s+", paragraph) if part.strip())


def words(sentence: str) -> int:
    """Words, numbers and pieces of code; punctuation alone does not count."""
    return len([word for word in sentence.split() if re.search(r"\w", word)])


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """(where, docstring) of a module, its classes and functions; first the module's own."""
    for node in ast.walk(_parsed(file)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = ast.get_docstring(node)
            if found:
                yield getattr(node, "name", "module"), found


def help_texts(file: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of every `help=` in a file."""
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.keyword) and node.arg == "help":
            parts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            yield f"help, line {node.value.lineno}", "".join(part for part in parts if isinstance(part, str))


def module_prose_lines(docstring: str) -> int:
    """Lines of prose in a module's docstring."""
    lines = [line for line in docstring.splitlines() if line.strip()]
    return sum(not (line.startswith("    ") or line.startswith("|")) for line in lines)


def long_sentences(file: Path) -> Iterator[tuple[int, str, str]]:
    """(words, where, sentence) of the sentences over MOST_WORDS in a page or a Python file."""
    texts = [("", file.read_text())] if file.suffix == ".md" else [*docstrings(file), *help_texts(file)]
    for where, text in texts:
        for sentence in sentences(text):
            if (count := words(sentence)) > MOST_WORDS:
                yield count, f"{file}: {where}", sentence


def long_module_docstring(file: Path) -> int:
    """Lines of prose at a module's top, where they are more than MOST_MODULE_LINES; else 0."""
    if file.suffix != ".py":
        return 0
    lines = module_prose_lines(ast.get_docstring(_parsed(file)) or "")
    return lines if lines > MOST_MODULE_LINES else 0


def pages_and_modules(path: Path) -> list[Path]:
    """The file itself, or every page and Python file of a folder."""
    return [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.md")])


if __name__ == "__main__":
    files = [file for argument in sys.argv[1:] for file in pages_and_modules(Path(argument))]
    for count, where, sentence in sorted((row for file in files for row in long_sentences(file)), reverse=True):
        sys.stdout.write(f"{count:4} {where}: {sentence}\n")
    for file in files:
        if lines := long_module_docstring(file):
            sys.stdout.write(f"{file}: {lines} lines of prose at its top\n")
