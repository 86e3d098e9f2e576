"""Runs the program in this process, and lists the commands that read each kind of artefact."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

from merino_edge.architecture import Architecture, Block
from merino_edge.cli.main import main

TINY = Architecture(
    vocab_size=300,
    max_positions=64,
    embedding_width=32,
    head_dim=16,
    blocks=(Block(32, 2, 2, 1, 48, shared=True),),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=16,
    bias="none",
)

ORIN_NANO = ("--board", "orin-nano-8gb", "--mode", "15W")
Refused = Callable[..., str]


def run(*arguments: object) -> int:
    """Run the program in this process, with an empty stdin. Returns its exit code."""
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["merino-edge", *map(str, arguments)], io.TextIOWrapper(io.BytesIO())
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv, sys.stdin = before
    return 0


def commands(good: Path, folder: Path, out: Path) -> dict[str, list[tuple[object, ...]]]:
    """For each kind of artefact, the commands that read the one in `folder`. Their other artefacts are in `good`."""
    return {
        "a.json": [train(folder / "a.json", good, out), ("show", folder / "a.json")],
        "space.json": [
            ("search", "--space", folder / "space.json", "--out", out),
            ("pareto", "--space", folder / "space.json", "--against", "flops", "--points", 3, "--out", out),
            profile(folder / "space.json", out),
            ("estimate", *ORIN_NANO, "--space", folder / "space.json", "--quick", "--out", out),
            ("show", folder / "space.json"),
        ],
        "table.jsonl": [
            ("search", "--space", good / "space.json", "--table", folder / "table.jsonl", "--out", out),
            ("show", folder / "table.jsonl"),
            ("show", good / "table.jsonl", "--against", folder / "table.jsonl"),
            ("pareto", "--space", good / "space.json", "--table", folder / "table.jsonl", "--points", 3, "--out", out),
        ],
        "result.json": [("search", "--from", folder / "result.json", "--out", out), ("show", folder / "result.json")],
        "checkpoint": [
            ("export", folder / "checkpoint", "--threads", 1, "--out", out),
            ("show", folder / "checkpoint"),
        ],
        "bundle": [
            ("generate", folder / "bundle", "--prompt", "hi", "--max-tokens", 2, "--threads", 1),
            ("bench", folder / "bundle", "--prompt-tokens", 2, "--new-tokens", 2, "--threads", 1),
            ("show", folder / "bundle"),
        ],
    }


def train(a: Path, good: Path, out: Path, *more: object) -> tuple[object, ...]:
    """The command of a training of two steps."""
    small = ("--steps", 2, "--batch", 1, "--sequence", 8, "--threads", 1)
    return ("train", a, "--corpus", good / "corpus.txt", *small, *more, "--out", out)


def profile(space: Path, out: Path) -> tuple[object, ...]:
    """The command of the shortest profile, whatever its verdict."""
    options = ("--minutes", 0.01, "--lengths", 64, "--threads", 1, "--exit-zero")
    return ("profile", "--space", space, *options, "--out", out)
