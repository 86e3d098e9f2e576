"""The verbs `generate` and `bench`: arguments, pipes, their output, and one-line refusals."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from merino_edge.cli.main import main
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run the program in this process: exit code, stdout, stderr."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["merino-edge", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


# --- once ------------------------------------------------------------------------------------------


def test_text_on_stdout_is_what_the_library_generates(
    verb: Verb, bundle_path: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    for flag, prompt in (("--raw", "The quick"), ("--chat", "<user> The quick\n<assistant> ")):
        code, out, err = verb("generate", bundle_path, "--prompt", "The quick", flag, "--greedy", "--max-tokens", 20)
        expected = "".join(generate(Session(engine), tokenizer, tokenizer.encode(prompt), Sampling(greedy=True), 20))
        assert (code, out.removesuffix("\n")) == (0, expected.removesuffix("\n"))
        assert "generation 20 tokens" in err


def test_stdin_is_a_prompt(verb: Verb, bundle_path: Path) -> None:
    options = ("generate", bundle_path, "--greedy", "--max-tokens", 10, "--verbose")
    piped, given = verb(*options, stdin="The quick 🦊\n".encode()), verb(*options, "--prompt", "The quick 🦊")
    assert piped[:2] == given[:2]
    assert [line.split()[0] for line in piped[2].splitlines()] == ["load", "prompt", "generation", "total", "note:"]


def test_json_is_one_object_that_repeats_the_answer(verb: Verb, bundle_path: Path, tokenizer: Tokenizer) -> None:
    code, out, _ = verb("generate", bundle_path, "--prompt", "The", "--max-tokens", 9, "--temperature", 1.5, "--json")
    answer = json.loads(out)
    assert code == 0
    assert set(answer) == {"text", "tokens", "finish_reason", "prompt_tokens", "statistics", "sampling", "bundle"}
    assert (len(answer["tokens"]), answer["finish_reason"]) == (9, "length")
    assert answer["text"] == tokenizer.decode(answer["tokens"])
    assert answer["sampling"]["temperature"] == 1.5
    seed = answer["sampling"]["seed"]
    _, again, _ = verb(
        "generate", bundle_path, "--prompt", "The", "--max-tokens", 9, "--temperature", 1.5, "--seed", seed, "--json"
    )
    assert json.loads(again)["tokens"] == answer["tokens"]
    stop = answer["text"][2:4]
    _, stopped, _ = verb(
        "generate",
        bundle_path,
        "--prompt",
        "The",
        "--max-tokens",
        9,
        "--temperature",
        1.5,
        "--seed",
        seed,
        "--json",
        "--stop",
        stop,
    )
    stopped = json.loads(stopped)
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", answer["text"][: answer["text"].index(stop)])


def test_draft_tokens_leave_the_answer_unchanged(
    verb: Verb, bundle_path: Path, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    options = (
        "generate",
        bundle_path,
        "--prompt",
        "The quick",
        "--greedy",
        "--max-tokens",
        60,
        "--threads",
        1,
        "--json",
    )
    plain = json.loads(verb(*options)[1])
    for speculative in (("--lookup",), ("--prompt-lookup",), ("--draft-model", bundle_path), ("--draft", bundle_path)):
        drafted = json.loads(verb(*options, *speculative)[1])
        assert drafted["tokens"] == plain["tokens"]
    assert drafted["statistics"]["right_guesses"] == drafted["statistics"]["guessed_tokens"]
    for speculative, exit_code, expected in (
        (("--lookup", "--draft", bundle_path), 2, "--lookup and --draft both propose draft tokens; give one"),
        (("--draft", tmp_path), 3, "manifest.json"),
    ):
        code, out, err = verb(*options, *speculative)
        assert (code, out, err.count("\n")) == (exit_code, "", 1) and expected in err


def test_bench_prints_a_table_or_one_object(verb: Verb, bundle_path: Path) -> None:
    options = ("bench", bundle_path, "--prompt-tokens", 8, "--new-tokens", 4, "--repetitions", 2, "--threads", 1)
    code, table, _ = verb(*options)
    assert code == 0
    assert all(name in table for name in ("pp8", "tg4", "tok/s", "p95 ms"))
    _, out, _ = verb(*options, "--json")
    report = json.loads(out)
    assert [result["test"] for result in report["results"]] == ["pp8", "tg4"]
    for result in report["results"]:
        assert result["min"] <= result["tokens_per_second"] <= result["max"] and len(result["samples"]) == 2
        assert 0 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"]
    assert [result["roofline_percent"] is None for result in report["results"]] == [True, False]
    assert report["peak_memory_mb"] > 0 and report["comparison"] == []
    assert [(card["precision"], card["threads"]) for card in report["bundles"].values()] == [("fp32", 1)]


def test_bench_in_other_forms_and_against_another_bundle(verb: Verb, bundle_path: Path, tmp_path: Path) -> None:
    lists = ("-p", "4,8", "-n", "2", "-d", "0,16", "-r", 2, "-t", 1)
    tests = ["pp4", "pp8", "pp4@d16", "pp8@d16", "tg2", "tg2@d16"]
    _, text, _ = verb("bench", bundle_path, *lists, "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["test"] for row in rows] == tests and all(float(row["tok/s"]) > 0 for row in rows)
    _, text, _ = verb("bench", bundle_path, *lists, "-o", "jsonl")
    assert [json.loads(line)["test"] for line in text.splitlines()] == tests
    _, text, _ = verb("bench", bundle_path, *lists, "-o", "md")
    assert text.count("\n") == len(tests) + 2 and all(line.startswith("| ") for line in text.splitlines())
    copied = shutil.copytree(bundle_path, tmp_path / "copied")
    _, out, _ = verb("bench", bundle_path, "-p", "0", "-n", "2", "-r", 3, "--against", copied, "--json")
    (comparison,) = json.loads(out)["comparison"]
    assert comparison["test"] == "tg2" and comparison["low"] <= comparison["ratio"] <= comparison["high"]
    assert 0.25 <= comparison["p_value"] <= 1  # three repetitions cannot give a smaller p value


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "says"),
    [
        (["--prompt", "The quick brown fox " * 100], b"", 2, "--context"),
        (["--prompt", ""], b"", 2, "empty"),
        ([], b"", 2, "empty"),
        ([], b"\xff\xfe", 2, "not UTF-8"),
        ([], b"x" * (2**20 + 1), 2, "more than 1048576 bytes"),
        (["--prompt", "a\udcff"], b"", 2, "not valid UTF-8"),
        (["--prompt", "a", "--temperature", "-1"], b"", 2, "temperature is -1.0"),
        (["--prompt", "a", "--top-p", "1.5"], b"", 2, "top_p is 1.5"),
        (["--prompt", "a", "--max-tokens", "0"], b"", 2, "max_tokens is 0"),
        (["--prompt", "a", "--threads", "0"], b"", 2, "threads is 0"),
        (["--prompt", "a", "--stop", ""], b"", 2, "--stop is empty"),
        (["--prompt", "a", "--raw", "--system", "b"], b"", 2, "chat template"),
    ],
)
def test_bad_input_is_one_line(
    verb: Verb, bundle_path: Path, arguments: list[str], stdin: bytes, code: int, says: str
) -> None:
    got, out, err = verb("generate", bundle_path, *arguments, stdin=stdin)
    assert (got, out.strip()) == (code, "")
    assert says in err
    assert err.startswith("merino-edge: ") and err.count("\n") == 1


def test_damaged_bundles_are_one_line(verb: Verb, bundle_path: Path, tmp_path: Path) -> None:
    def damaged(name: str, change: Callable[[bytes], bytes]) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle_path, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    def flip(data: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    bundles = [
        tmp_path / "none",
        *(damaged(name, flip) for name in ("model.onnx", "tokenizer.json", "manifest.json")),
        damaged("model.onnx", lambda data: data[:-1]),
    ]
    for path in bundles:
        for name, arguments in (("generate", ("--prompt", "a")), ("bench", ())):
            code, out, err = verb(name, path, *arguments)
            assert (code, out) == (3, "")
            assert err.startswith("merino-edge: ") and err.count("\n") == 1


def test_bench_refuses_more_than_the_context(verb: Verb, bundle_path: Path) -> None:
    code, out, err = verb("bench", bundle_path, "--prompt-tokens", 300, "--depth", 21)
    assert (code, out) == (2, "")
    assert "exceed the context of 320" in err.splitlines()[-1]


# --- answers that are cut off ----------------------------------------------------------------------


def test_a_cut_answer_says_so_and_names_the_option(verb: Verb, bundle_path: Path) -> None:
    once = ("generate", bundle_path, "--prompt", "The quick", "--greedy")
    code, out, err = verb(*once, "--max-tokens", 5)
    assert code == 0 and err.endswith("note: the answer was cut off after 5 tokens; raise --max-tokens\n")
    assert verb(*once, "--max-tokens", 5, "--json")[2] == err[err.index("note:") :]
    code, _, err = verb(*once, "--max-tokens", 5000)
    assert code == 0 and "where the context of 320 positions is full; shorten the prompt" in err.splitlines()[-1]
    code, _, err = verb(*once, "--max-tokens", 5, "--stop", out[:2])
    assert code == 0 and "cut off" not in err


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_an_answer_without_its_form_is_an_error(verb: Verb, bundle_path: Path, as_json: list[str]) -> None:
    def once(pattern: str, tokens: int, *more: str) -> tuple[int, str, str]:
        options = ("--prompt", "a", "--greedy", "--regex", pattern, "--max-tokens", tokens)
        return verb("generate", bundle_path, *options, *as_json, *more)

    code, out, err = once("(abc ){20}", 5)
    line = "merino-edge: the answer ends before it has its form (length); raise --max-tokens"
    assert code == 10 and "abc" in out and err.splitlines()[-1] == line
    assert once("(abc ){2}", 100)[0] == 0
    code, _, err = once("(abc ){20}", 100, "--stop", "c abc")
    assert code == 10 and "(stop)" in err
    assert once("[a-z ]*", 5)[0] == 0  # any beginning is a whole answer
