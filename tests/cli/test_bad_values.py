"""Numbers, budgets, prompts and corpora that cannot be used."""

from __future__ import annotations

import inspect
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.stranger import Refused, commands, train
from merino_edge.cli import outputs
from merino_edge.cli.estimate import estimate
from merino_edge.cli.pareto import pareto
from merino_edge.cli.profile import profile
from merino_edge.cli.search import search
from merino_edge.errors import MerinoError

NO_NUMBERS = ["nan", "inf", "-inf", "1e309", "abc", "", "0x10", "-1"]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, "1.5", "1e9", str(2**63), "9" * 5000]
WHOLE = {
    "train": ["--steps", "--batch", "--sequence", "--micro-batch", "--warmup", "--seed", "--threads", "--save-every"],
    "export": ["--context", "--threads", "--block"],
    "generate": ["--max-tokens", "--top-k", "--seed", "--threads"],
    "bench": ["--prompt-tokens", "--new-tokens", "--depth", "--repetitions", "--threads"],
    "search": ["--iterations", "--population", "--parents", "--seed"],
    "pareto": ["--points"],
    "profile": ["--threads"],
    "demo": ["--steps", "--threads"],
}
BUDGETS = ["--decode-ms", "--text-ms", "--prefill-ms", "--first-token-ms", "--params", "--flops"]
BUDGETS += ["--weight-mb", "--kv-mb", "--peak-mb"]
REAL = {
    "export": ["--max-kl", "--max-mb"],
    "train": ["--learning-rate"],
    "generate": ["--temperature", "--top-p", "--min-p", "--repetition-penalty"],
    "demo": ["--decode-ms", "--minutes"],
    "profile": ["--minutes"],
    "search": [*BUDGETS, "--seconds"],
    "pareto": BUDGETS,
}
ZERO_IS_FINE = {"--warmup", "--seed", "--top-k", "--iterations", "--temperature", "--top-p", "--min-p"}
ZERO_IS_FINE |= {"--prompt-tokens", "--new-tokens", "--depth"}


def command(verb: str, good: Path, out: Path) -> tuple[object, ...]:
    if verb == "demo":
        return ("demo", "--out", out)
    everything = [arguments for readers in commands(good, good, out).values() for arguments in readers]
    return next(arguments for arguments in everything if arguments[0] == verb)


@pytest.mark.parametrize("verb", WHOLE)
def test_whole_numbers(good: Path, tmp_path: Path, refused: Refused, verb: str) -> None:
    solver = ("--solver", "evolution") if verb == "search" else ()
    for option in WHOLE[verb]:
        for value in NO_WHOLE_NUMBERS if option in ZERO_IS_FINE else [*NO_WHOLE_NUMBERS, "0"]:
            refused(*command(verb, good, tmp_path / "out"), *solver, f"{option}={value}")


@pytest.mark.parametrize("verb", REAL)
def test_real_numbers(good: Path, tmp_path: Path, refused: Refused, verb: str) -> None:
    for option in REAL[verb]:
        for value in NO_NUMBERS if option in ZERO_IS_FINE else [*NO_NUMBERS, "0"]:
            refused(*command(verb, good, tmp_path / "out"), f"{option}={value}")


@pytest.mark.parametrize(
    ("verb", "more", "options"),
    [
        (search, {}, ["space", "solver", "score", "precision", "target"]),
        (pareto, {}, ["space", "score", "precision", "target"]),
        (estimate, {"board": "orin-nano-8gb", "mode": "15W"}, ["space", "precision", "target", "runtime"]),
        (profile, {"dry_run": True}, ["space", "precision", "backend"]),
    ],
)
def test_an_empty_text_is_not_the_default(
    tmp_path: Path, verb: Callable[..., None], more: dict[str, Any], options: list[str]
) -> None:
    """Also where a verb is called from Python, past the check of the command line."""
    for option in options:
        with outputs.of_verb(), pytest.raises(MerinoError, match=rf"{option} ''"):
            inspect.unwrap(verb)(out=tmp_path / "out", **more, **{option: ""})
    assert not list(tmp_path.iterdir())


def test_budgets_that_nothing_meets_name_the_nearest_value(good: Path, tmp_path: Path, refused: Refused) -> None:
    search = ("search", "--space", good / "space.json", "--table", good / "table.jsonl", "--out", tmp_path / "out")
    for option in BUDGETS:
        line = refused(*search, option, "1e-9")
        least = line.split("the least possible is ")[1].split(")")[0]
        assert line.endswith(f"raise {option}") and float(least.rstrip("KM")) > 0
    both = refused(*search, "--params", 1, "--flops", 1)
    assert both.count("the least possible is") == 2 and both.endswith("raise --params and --flops")


def test_what_does_not_fit_the_context(good: Path, tmp_path: Path, refused: Refused) -> None:
    bundle, too_long = good / "bundle", "stranger " * 500
    for prompt in (too_long, too_long * 5):
        line = refused("generate", bundle, "--prompt", prompt, "--threads", 1)
        assert "tokens, the context of this bundle is 64; shorten it" in line
    assert "the prompt is empty" in refused("generate", bundle, "--prompt", "", "--threads", 1)
    line = refused("bench", bundle, "--new-tokens", 60, "--depth", 60, "--threads", 1)
    assert "64 tokens behind 60 exceed the context of 64" in line
    line = refused("export", good / "checkpoint", "--context", 65, "--out", tmp_path / "out")
    assert "context 65 is outside 1 to the model's 64 positions" in line
    line = refused(*train(good / "a.json", good, tmp_path / "out", "--sequence", 65))
    assert "longer than the model's 64 positions" in line


def source(folder: Path, name: str, content: bytes | None) -> Path:
    """Write `content` into `folder`/`name` and return the path to name on the command line. None writes nothing."""
    file = folder / "in" / name
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    return file.parent if "/" in name else file


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "the corpus holds no text, zero tokens"),
        ("separator.txt", b"<|endoftext|>" * 9, "the corpus holds no text, zero tokens"),
        ("short.txt", b"hello", "too few for sequences of 8"),
        ("binary.txt", bytes(range(256)) * 9, "is not "),
        ("zeros.txt", b"text\0text\n" * 99, "is not text (it holds zero bytes)"),
        ("latin.txt", "Zwölf Boxkämpfer\n".encode("latin-1") * 99, "is not UTF-8 text"),
        ("half.txt.xz", lzma.compress(bytes(9999))[:-9], "is not a whole .xz file"),
        ("folder/notes.md", b"text", "holds no .txt or .jsonl file"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_a_corpus_without_text(
    good: Path, tmp_path: Path, refused: Refused, name: str, content: bytes | None, says: str
) -> None:
    corpus = source(tmp_path, name, content)
    arguments = ("--steps", 2, "--batch", 1, "--sequence", 8, "--threads", 1, "--out", tmp_path / "out")
    assert says in refused("train", good / "a.json", "--corpus", corpus, *arguments)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", bytes(range(256)) * 9, "is not "),
        ("folder/notes.md", b"text", "holds no .txt or .jsonl file"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_a_text_that_names_no_vocabulary(
    good: Path, tmp_path: Path, refused: Refused, name: str, content: bytes | None, says: str
) -> None:
    text = source(tmp_path, name, content)
    assert says in refused("export", good / "checkpoint", "--keep-vocab", text, "--out", tmp_path / "out")


def test_a_mixture_of_precisions_that_is_none(good: Path, tmp_path: Path, refused: Refused) -> None:
    for option in ("--max-kl", "--max-mb"):
        said = refused("export", good / "checkpoint", option, 1, "--precision", "fp16", "--out", tmp_path / "out")
        assert f"{option} upgrades int4 matrices to int8, the precision is fp16" in said
