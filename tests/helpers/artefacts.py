"""Fixtures: one small artefact of each kind, made by the program itself, and a check that a command is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from helpers.made_once import MadeOnce
from helpers.quick_profile import hasten
from helpers.stranger import TINY, Refused, profile, run
from helpers.warm_python import warm_merino
from merino_edge import architecture, artefact, checkpoint
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.search import space_file
from merino_edge.search.builtin_spaces import DEMO
from merino_edge.search.space import Vocabulary
from merino_edge.weights import random_weights

TEXT = "Once upon a time a small model met a stranger, who gave it everything but what it asked for. " * 20


@pytest.fixture(scope="session")
def good(made_once: MadeOnce) -> Path:
    """A folder of valid artefacts. Copy one before you change it."""
    pytest.importorskip("torch")  # which export compares with
    return made_once("good", make_artefacts)


def make_artefacts(folder: Path) -> None:
    folder.mkdir()
    (folder / "corpus.txt").write_text(TEXT)
    architecture.save(folder / "a.json", TINY)
    blocks = {"blocks": (1, 2), "widths": (32, 64), "ffn_ratios": (1, 2), "layers": (1, 2), "kv_groups": (1, 2)}
    frames = {"embedding_widths": (32,), "vocabularies": (Vocabulary(300, 1.9),), "contexts": (64,)}
    space = dataclasses.replace(
        DEMO, name="tiny", shared=(False, True), model=TINY, least_embedding=0, **blocks, **frames
    )
    artefact.write_json(folder / "space.json", "space", space_file.to_dict(space), space_file.SCHEMA_VERSION)
    assert run("search", "--space", folder / "space.json", "--flops", "1G", "--out", folder / "result.json") == 0
    tokenizer = train_tokenizer(iter([TEXT]), TINY.vocab_size).to_str()
    checkpoint.save(
        folder / "checkpoint",
        TINY,
        random_weights(TINY),
        tokenizer_json=tokenizer,
        chat=chat_format(),
        training={"source": "random"},
    )
    assert run("export", folder / "checkpoint", "--threads", 1, "--out", folder / "bundle") == 0
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        assert run(*profile(folder / "space.json", folder / "table.jsonl")) == 0


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run the program, check that it refuses as promised, and return the line that says why.

    A refusal exits with an error code, prints no traceback, and leaves nothing behind in the folder of --out.
    """

    def check(*arguments: object) -> str:
        capfd.readouterr()
        words = list(map(str, arguments))
        folder = Path(words[words.index("--out") + 1]).parent if "--out" in words else tmp_path
        before = sorted(folder.iterdir()) if folder.is_dir() else []
        code = run(*words)
        out, err = capfd.readouterr()
        assert code != 0, f"{words} succeeded"
        assert out == "" and "Traceback" not in err and "unexpected" not in err, err
        last = err.strip("\n").split("\n")[-1]
        assert last.startswith("merino-edge: ") or "Usage: " in err, err
        assert (sorted(folder.iterdir()) if folder.is_dir() else []) == before, "something was left behind"
        return " ".join(err.split()) if "Usage: " in err else last

    return check


@pytest.fixture(scope="session")
def merino() -> tuple[str, ...]:
    """The program as a command, for tests that need a process of their own."""
    return (warm_merino(),)
