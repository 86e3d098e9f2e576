"""`generate` in a real terminal: the chat and its commands, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import readline
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from helpers.warm_python import warm_merino
from merino_edge.architecture import Architecture
from merino_edge.cli.terminal import interruptible
from merino_edge.tokenizer import ChatFormat, Tokenizer

# What the console script does. In a terminal, it takes that as its controlling terminal, so that Ctrl-C reaches it.
# It runs from a bundle's folder, because `-c` puts the current folder on the path.
IN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
PROGRAM = "from merino_edge.cli.main import main; main()"
PROMPTED = r"\n(\x1b\S*)?> $"  # a terminal that can paste is told so before each prompt
LONG_CONTEXT = 30_000  # an answer this long fills the pipe's buffer, so it cannot end before Ctrl-C arrives


@pytest.fixture(scope="module")
def long_bundle(make_bundle: Callable[..., Path], small_model: tuple[Architecture, dict[str, np.ndarray]]) -> Path:
    return make_bundle(small_model[1], context=LONG_CONTEXT)


# --- Ctrl-C ----------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_answer_keeps_what_was_said_and_exits_130(long_bundle: Path) -> None:
    arguments = ["generate", long_bundle, "--prompt", "The", "--greedy", "--max-tokens", str(LONG_CONTEXT)]
    with subprocess.Popen(
        [warm_merino(), *arguments],
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
        seen, deadline = "", time.monotonic() + 20
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline and select.select([self.terminal], [], [], 20)[0], f"only saw {seen!r}"
            seen += os.read(self.terminal, 1024).decode(errors="replace")
        return seen

    def type(self, text: str, until: str = r"\n> $") -> str:
        os.write(self.terminal, text.encode())
        return self.read_until(until)

    def interrupt(self) -> str:
        """Press Ctrl-C at the prompt until something is said: see `leave`."""
        for _ in range(12):
            os.write(self.terminal, b"\x03")
            if select.select([self.terminal], [], [], 5)[0]:
                return self.read_until(r"leaves\r\n> $")
        raise AssertionError("Ctrl-C does nothing")

    def leave(self, key: str) -> int:
        """Press `key` until the program ends: Python misses a Ctrl-C between printing a prompt and waiting.

        Between two presses a busy machine has time to end it. A second Ctrl-C while Python exits would kill it.
        """
        for _ in range(12):
            os.write(self.terminal, key.encode())
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=5)
        raise AssertionError(f"{key!r} does not end the program")


@contextmanager
def chatting(bundle: Path, *options: str, term: str = "dumb") -> Iterator[Typist]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL + PROGRAM, "generate", bundle, "--greedy", *options],
        cwd=bundle,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": term},
    ) as process:
        os.close(theirs)
        typist = Typist(process, ours)
        try:
            typist.read_until(rf"{bundle.name}: .* M parameters, fp32, \d+ positions.*/help .*{PROMPTED}")
            yield typist
        finally:
            process.kill()
            os.close(ours)


def test_the_chat_answers_and_obeys(bundle_path: Path, tokenizer: Tokenizer) -> None:
    answered = r"generation \d+ tokens (?s:.*)\n> $"
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
        assert "/set KEY VALUE" in typist.type("/?\n") and "/load FILE" in typist.type("/help\n")
        typist.type('"""The\n', r"\. $")
        several = typist.type('quick"""\n', answered)
        tokens = len(tokenizer.encode("<user> The\nquick\n<assistant> "))
        assert f"prompt {tokens} tokens" in several and "generation 3 tokens" in several
        assert "--context" in typist.type("The quick brown fox " * 100 + "\n")
        assert typist.leave("/bye\n") == 0


def test_settings_are_shown_and_conversations_saved(bundle_path: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text('{"messages": [{"role": "assistant", "content": "Hi."}]}')
    with chatting(bundle_path, "--max-tokens", "7") as typist:
        assert "there is no message yet" in typist.type(f"/save {file}\n")
        assert "temperature = 0.3" in typist.type("/set temperature 0.3\n")
        assert "give true or false" in typist.type("/set slide 3\n")
        assert "slide = true" in typist.type("/set slide on\n")
        shown = typist.type("/set\n")
        values = dict(line.split() for line in re.findall(r"^\w+ +\S+(?=\r$)", shown, re.MULTILINE))
        assert values["temperature"] == "0.3" and values["slide"] == "true" and values["seed"] == "none"
        assert "cut off after 7 tokens; /set max_tokens" in typist.type("The quick\n", r"cut off.*\n> $")
        assert "2 messages are in" in typist.type(f"/save {file}\n")
        assert f"{file} exists; choose another name" in typist.type(f"/save {file}\n")
        typist.type("/reset\n")
        assert "questions and answers in turns" in typist.type(f"/load {other}\n")
        assert "does not exist" in typist.type(f"/load {tmp_path / 'none'}\n")
        assert "goes on after 2 messages" in typist.type(f"/load {file}\n")
        assert "4 messages are in" in typist.type("fox\n", r"cut off.*\n> $") + typist.type(f"/save {tmp_path / 'b'}\n")
        assert typist.leave("\x04") == 0
    messages = json.loads((tmp_path / "b").read_text())["messages"]
    assert messages[:2] == json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "other.json", "talk.json"]


@pytest.mark.skipif("GNU" not in (readline.__doc__ or ""), reason="libedit has no bracketed paste")
def test_pasted_text_is_one_message_and_names_are_completed(bundle_path: Path, tokenizer: Tokenizer) -> None:
    with chatting(bundle_path, "--max-tokens", "3", term="xterm") as typist:
        asked = typist.type("\x1b[200~The\nquick\x1b[201~\n", PROMPTED)
        tokens = len(tokenizer.encode("<user> The\nquick\n<assistant> "))
        assert f"prompt {tokens} tokens" in asked and asked.count("generation 3") == 1
        assert "max_tokens = 5" in typist.type("/se\tmax\t5\n", PROMPTED)
        typist.type("\\\n", r"\. $")
        assert typist.leave("\x04") == 0


def test_a_full_context_suggests_reset(bundle_path: Path) -> None:
    with chatting(bundle_path, "--max-tokens", "1000") as typist:
        assert "the context is full; /reset" in typist.type("The quick\n", r"full.*\n> $")
        assert "/reset starts a new one" in typist.type("brown fox\n")
        typist.type("/reset\n")
        typist.type("/set max_tokens=2\n")
        assert "generation 2 tokens" in typist.type("brown fox\n", r"generation (?s:.*)\n> $")
        assert typist.leave("\x04") == 0


def test_ctrl_c_ends_the_turn_and_at_the_prompt_the_program(long_bundle: Path) -> None:
    with chatting(long_bundle, "--max-tokens", str(LONG_CONTEXT)) as typist:
        typist.type("The quick\n", r"quick\r\n[^\r\n]*\S")  # the answer has begun
        ended = typist.type("\x03", r"generation \d+ tokens (?s:.*)\n> $")
        made = re.search(r"generation (\d+) tokens", ended)
        assert made and int(made[1]) < LONG_CONTEXT - 100
        typist.type("/set max_tokens=2\n")
        assert "generation 2 tokens" in typist.type("brown fox\n", r"generation (?s:.*)\n> $")
        typist.type("half a question", "question$")
        assert "Ctrl-D or /exit leaves" in typist.interrupt()
        assert "generation 2 tokens" in typist.type("fox\n", r"generation (?s:.*)\n> $")
        typist.interrupt()
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
    command = [warm_merino(), *options]
    piped = subprocess.run(command, cwd=path, stdin=subprocess.DEVNULL, capture_output=True)
    assert piped.stdout == b"\x1b\x1b\x1b\n"
    with chatting(path, "--max-tokens", "3") as typist:
        assert "\x1b\x1b" not in typist.type("a\n", r"generation 3 tokens (?s:.*)\n> $")
        assert typist.leave("/exit\n") == 0
