"""`generate` and `bench` as a user meets them: arguments, pipes, a real terminal, Ctrl-C, and one-line refusals."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from merino_edge.architecture import Architecture
from merino_edge.cli.main import main
from merino_edge.cli.terminal import interruptible
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import ChatFormat, Tokenizer

# What the console script does. In a terminal, it takes that as its controlling terminal, so that Ctrl-C reaches it.
# It runs from a bundle's folder, because `-c` puts the current folder on the path.
IN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
PROGRAM = "from merino_edge.cli.main import main; main()"
LONG_CONTEXT = 30_000  # an answer this long fills the pipe's buffer, so it cannot end before Ctrl-C arrives

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


@pytest.fixture(scope="module")
def long_bundle(make_bundle: Callable[..., Path], small_model: tuple[Architecture, dict[str, np.ndarray]]) -> Path:
    return make_bundle(small_model[1], context=LONG_CONTEXT)


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
    assert [line.split()[0] for line in piped[2].splitlines()] == ["load", "prompt", "generation", "total"]


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
        (["--prompt", "a", "--stop", ""], b"", 2, "stop string is empty"),
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


# --- Ctrl-C ----------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_answer_keeps_what_was_said_and_exits_130(long_bundle: Path) -> None:
    arguments = ["generate", long_bundle, "--prompt", "The", "--greedy", "--max-tokens", str(LONG_CONTEXT)]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=long_bundle,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    made = re.fullmatch(rb"prompt .* generation (\d+) tokens .*\n", err)
    assert made and 0 < int(made[1]) < LONG_CONTEXT - 100


def test_the_second_ctrl_c_interrupts_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as cancel:  # noqa: PT012
        assert not cancel.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --- the chat --------------------------------------------------------------------------------------


class Typist:
    """Types into a real terminal and reads what appears there."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process, self.terminal = process, terminal

    def read_until(self, pattern: str) -> str:
        """Return what appears, up to and including the first match of `pattern`."""
        seen, deadline = "", time.monotonic() + 60
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline and select.select([self.terminal], [], [], 60)[0], f"only saw {seen!r}"
            seen += os.read(self.terminal, 1024).decode(errors="replace")
        return seen

    def type(self, text: str, until: str = r"\n> $") -> str:
        os.write(self.terminal, text.encode())
        return self.read_until(until)

    def leave(self, key: str) -> int:
        """Press `key` until the program ends: Python misses a Ctrl-C between printing a prompt and waiting."""
        for _ in range(60):
            os.write(self.terminal, key.encode())
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=1)
        raise AssertionError(f"{key!r} does not end the program")


@contextmanager
def chatting(bundle: Path, *options: str) -> Iterator[Typist]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL + PROGRAM, "generate", bundle, "--greedy", *options],
        cwd=bundle,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    ) as process:
        os.close(theirs)
        typist = Typist(process, ours)
        try:
            typist.read_until(r"/help .*\n> $")
            yield typist
        finally:
            process.kill()
            os.close(ours)


def test_the_chat_answers_and_obeys(bundle_path: Path, tokenizer: Tokenizer) -> None:
    answered = r"generation \d+ tokens .*\n> $"
    with chatting(bundle_path, "--max-tokens", "7") as typist:
        assert "no answer yet" in typist.type("/stats\n")
        assert "generation 7 tokens" in typist.type("The quick\n", answered)
        assert "tok/s" in typist.type("/stats\n")
        assert "unknown command /nonsense; /help" in typist.type("/nonsense\n")
        assert "temperature is -3.0, outside 0 to 100" in typist.type("/set temperature=-3\n")
        assert "give a number" in typist.type("/set top_k=many\n")
        assert "cannot set 'mood=good'" in typist.type("/set mood=good\n")
        assert "max_tokens is 0" in typist.type("/set max_tokens=0\n")
        assert "max_tokens = 3" in typist.type("/set max_tokens=3\n")
        assert "new conversation" in typist.type("/reset\n")
        assert "/set KEY=VALUE" in typist.type("/help\n")
        typist.type('"""The\n', r"\. $")
        several = typist.type('quick"""\n', answered)
        tokens = len(tokenizer.encode("<user> The\nquick\n<assistant> "))
        assert f"prompt {tokens} tokens" in several and "generation 3 tokens" in several
        assert "--context" in typist.type("The quick brown fox " * 100 + "\n")
        assert typist.leave("/exit\n") == 0


def test_a_full_context_suggests_reset(bundle_path: Path) -> None:
    with chatting(bundle_path, "--max-tokens", "1000") as typist:
        assert "the context is full; /reset" in typist.type("The quick\n", r"full.*\n> $")
        assert "/reset starts a new one" in typist.type("brown fox\n")
        typist.type("/reset\n")
        typist.type("/set max_tokens=2\n")
        assert "generation 2 tokens" in typist.type("brown fox\n", r"generation .*\n> $")
        assert typist.leave("\x04") == 0


def test_ctrl_c_ends_the_turn_and_at_the_prompt_the_program(long_bundle: Path) -> None:
    with chatting(long_bundle, "--max-tokens", str(LONG_CONTEXT)) as typist:
        typist.type("The quick\n", r"quick\r\n[^\r\n]*\S")  # the answer has begun
        ended = typist.type("\x03", r"generation \d+ tokens .*\n> $")
        made = re.search(r"generation (\d+) tokens", ended)
        assert made and int(made[1]) < LONG_CONTEXT - 100
        typist.type("/set max_tokens=2\n")
        assert "generation 2 tokens" in typist.type("brown fox\n", r"generation .*\n> $")
        assert typist.leave("\x03") == 130


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    make_bundle: Callable[..., Path], small_model: tuple[Architecture, dict[str, np.ndarray]], tokenizer: Tokenizer
) -> None:
    """The model prints nothing but ESC. A pipe gets it as it is, a terminal does not get it."""
    escape = tokenizer.encode("\x1b")[0]
    a, weights = small_model
    embedding = np.zeros((a.vocab_size, a.embedding_width), np.float32)
    embedding[:, 0] = 1
    embedding[escape, 0] = 2
    only_escape = {name: np.zeros_like(value) for name, value in weights.items()}
    only_escape |= {"embedding.weight": embedding, "final_norm.weight": np.ones_like(weights["final_norm.weight"])}
    path = make_bundle(only_escape, ChatFormat())
    options = ["generate", str(path), "--greedy", "--max-tokens", "3", "--prompt", "a"]
    command = [sys.executable, "-c", PROGRAM, *options]
    piped = subprocess.run(command, cwd=path, stdin=subprocess.DEVNULL, capture_output=True)
    assert piped.stdout == b"\x1b\x1b\x1b\n"
    with chatting(path, "--max-tokens", "3") as typist:
        assert "\x1b\x1b" not in typist.type("a\n", r"generation 3 tokens .*\n> $")
        assert typist.leave("/exit\n") == 0
