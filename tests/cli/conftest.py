"""One small artefact of every kind, made by the program itself, and a stranger who is refused."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from merino_edge import architecture, artefact, checkpoint, limits
from merino_edge.architecture import Architecture, Block
from merino_edge.cli.main import main
from merino_edge.data import chat_format, train_tokenizer
from merino_edge.search.space import DEMO
from merino_edge.weights import random_weights

TEXT = "Once upon a time a small model met a stranger, who gave it everything but what it asked for. " * 20
TINY = Architecture(
    300,
    64,
    32,
    16,
    (Block(32, 2, 2, 1, 48, True),),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=16,
    bias="none",
)

Refused = Callable[..., str]


def run(*arguments: object) -> int:
    """The program in this process; its exit code."""
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["merino-edge", *map(str, arguments)], io.TextIOWrapper(io.BytesIO())
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv, sys.stdin = before
    return 0


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artefacts that nothing is wrong with; copy before you harm one."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "corpus.txt").write_text(TEXT)
    architecture.save(folder / "a.json", TINY)
    choices = {"widths": (32, 64), "ffn_ratios": (1, 2), "layers": (1, 2)}
    space = dataclasses.replace(DEMO, name="tiny", blocks=2, model=dataclasses.replace(TINY, head_dim=16), **choices)
    artefact.write_json(folder / "space.json", "space", space.to_dict())
    tokenizer = train_tokenizer(iter([TEXT]), TINY.vocab_size).to_str()
    checkpoint.save(folder / "checkpoint", TINY, random_weights(TINY), tokenizer, chat_format(), {"source": "random"})
    assert run("export", folder / "checkpoint", "--threads", 1, "--out", folder / "bundle") == 0
    measure = ("profile", "--space", folder / "space.json", "--quick", "--threads", 1, "--out", folder / "table.jsonl")
    assert run(*measure) == 0
    return folder


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run the program, assert that it refuses as it promises, and return the line that says why."""

    def check(*arguments: object) -> str:
        capfd.readouterr()
        folder = next((Path(str(out)).parent for flag, out in zip(arguments, arguments[1:]) if flag == "--out"), tmp_path)
        before = sorted(folder.iterdir()) if folder.is_dir() else []
        code = run(*arguments)
        out, err = capfd.readouterr()
        assert code != 0, f"{arguments} succeeded"
        assert out == "" and "Traceback" not in err and "unexpected" not in err, err
        last = err.strip("\n").split("\n")[-1]
        assert last.startswith("merino-edge: ") or "Usage: " in err, err
        assert (sorted(folder.iterdir()) if folder.is_dir() else []) == before, "something was left behind"
        return " ".join(err.split()) if "Usage: " in err else last

    return check


def commands(good: Path, folder: Path, out: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every verb that reads each kind of artefact, told to read that in `folder`."""
    return {
        "a.json": [train(folder / "a.json", good, out), ("show", folder / "a.json")],
        "space.json": [
            ("search", "--space", folder / "space.json", "--iterations", 10, "--out", out),
            ("profile", "--space", folder / "space.json", "--threads", 1, "--quick", "--out", out),
            ("show", folder / "space.json"),
        ],
        "table.jsonl": [
            ("search", "--space", good / "space.json", "--table", folder / "table.jsonl", "--out", out),
            ("show", folder / "table.jsonl"),
        ],
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
    """A training of two steps."""
    small = ("--steps", 2, "--batch", 1, "--sequence", 8, "--threads", 1)
    return ("train", a, "--corpus", good / "corpus.txt", *small, *more, "--out", out)
