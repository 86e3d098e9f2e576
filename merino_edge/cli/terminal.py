"""The chat in the terminal: one turn at a time, its statistics, and the loop that obeys /commands.

Answers go to stdout, everything else to stderr. Control characters of a model never reach a terminal."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from merino_edge.errors import InputError, MerinoError

if TYPE_CHECKING:
    from merino_edge.runtime.chat import Chat
    from merino_edge.runtime.generation import Generation, Statistics

HELP = """\
/set KEY=VALUE   change {keys}
/stats           times of the last answer
/reset           start a new conversation
/exit            leave (also Ctrl-D); Ctrl-C ends an answer
\"\"\"              begins and ends a message of several lines"""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Gives an event that the first Ctrl-C sets. The second Ctrl-C raises KeyboardInterrupt."""
    cancel = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def run_turn(talk: Chat, text: str, *, quiet: bool = False) -> Generation:
    """Run one turn to its end and write its text as it comes, unless `quiet`."""
    # A model must not steer the terminal. So a terminal gets no control characters but newline and tab.
    drop = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}) if sys.stdout.isatty() else {}
    with interruptible() as cancel:
        answer = talk.send(text, cancel)
        try:
            for piece in answer:
                if not quiet:
                    sys.stdout.write(piece.translate(drop))
                    sys.stdout.flush()
        finally:
            answer.close()
            if not quiet and answer.text and not answer.text.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
    return answer


def print_statistics(statistics: Statistics, load_ms: float, *, verbose: bool) -> None:
    """Print one line, or with `verbose` four lines in llama.cpp's order: load, prompt, generation, total."""
    from merino_edge.cli.console import stderr

    s, computed = statistics, statistics.prompt_tokens - statistics.reused_tokens
    if verbose:
        total_ms = s.prompt_ms + s.decode_ms
        lines = [
            f"load       {load_ms:9.1f} ms",
            f"prompt     {s.prompt_ms:9.1f} ms {_per_token(computed, s.prompt_ms)}, {s.reused_tokens} reused",
            f"generation {s.decode_ms:9.1f} ms {_per_token(max(s.generated_tokens - 1, 0), s.decode_ms)}",
            f"total      {total_ms:9.1f} ms {_per_token(computed + s.generated_tokens, total_ms)}",
        ]
    else:
        rates = (s.prompt_tokens_per_second, s.decode_tokens_per_second)
        prompt, decode = (f"{rate:.1f} tok/s" if rate else "-" for rate in rates)
        first = "-" if s.first_token_ms is None else f"{s.first_token_ms:.0f} ms"
        lines = [
            f"prompt {s.prompt_tokens} tokens {prompt}, first token {first}, "
            f"generation {s.generated_tokens} tokens {decode}"
        ]
    stderr().print("\n".join(lines), style="dim", markup=False, soft_wrap=True)


def _per_token(tokens: int, elapsed_ms: float) -> str:
    if not tokens or not elapsed_ms:
        return f"/ {tokens:5d} tokens"
    return f"/ {tokens:5d} tokens ({elapsed_ms / tokens:7.2f} ms per token, {tokens / elapsed_ms * 1e3:7.1f} tok/s)"


class Terminal:
    """The interactive chat: reads lines, answers them, and obeys /commands."""

    def __init__(self, talk: Chat, load_ms: float, *, verbose: bool) -> None:
        self.talk, self.load_ms, self.verbose = talk, load_ms, verbose
        fields = dataclasses.fields(talk.sampling)
        self.keys = [field.name for field in fields if field.name != "logit_bias"] + ["max_tokens"]

    def run(self) -> None:
        """Read and answer until /exit or Ctrl-D. A refused turn prints one line.

        Raises KeyboardInterrupt on Ctrl-C at the prompt.
        """
        with suppress(ImportError):
            import readline  # noqa: F401  input() then has line editing and a history
        self._say("/help lists the commands, /exit leaves")
        with suppress(EOFError):
            while (text := self._read()) != "/exit":
                try:
                    self._obey(text)
                except MerinoError as error:
                    self._say(str(error))

    def _read(self) -> str:
        """Read one message: a line, or everything between two `\"""`."""
        text = self._line("> ")
        if not text.startswith('"""'):
            return text.strip()
        text = text[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + self._line(". ")
        return text.rstrip()[:-3]

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)  # stdout is a file, which gets only the answers
        sys.stderr.flush()
        return input()

    def _obey(self, text: str) -> None:
        command, _, argument = text.partition(" ")
        if not text:
            return
        if not text.startswith("/"):
            self._ask(text)
        elif command == "/help":
            self._say(HELP.format(keys=", ".join(self.keys)))
        elif command == "/reset":
            self.talk.reset()
            self._say("new conversation")
        elif command == "/stats":
            if self.talk.turn is None:
                raise InputError("no answer yet", "ask something")
            print_statistics(self.talk.turn.statistics, self.load_ms, verbose=True)
        elif command == "/set":
            self._set(argument)
        else:
            raise InputError(f"unknown command {command}", "/help lists the commands")

    def _ask(self, text: str) -> None:
        answer = run_turn(self.talk, text)
        print_statistics(answer.statistics, self.load_ms, verbose=self.verbose)
        if self.talk.dropped:
            self._say(f"the {self.talk.dropped} oldest messages no longer fit the context and were dropped")
        if answer.finish_reason == "context":
            hint = "" if self.talk.truncate_history else "; /reset starts a new conversation"
            self._say(f"the context is full{hint}")

    def _set(self, argument: str) -> None:
        from merino_edge import limits

        key, separator, text = (part.strip() for part in argument.partition("="))
        if not separator or key not in self.keys:
            raise InputError(f"cannot set {argument!r}", f"/set KEY=VALUE with one of {', '.join(self.keys)}")
        try:
            value: Any = {"true": True, "false": False, "none": None}.get(text.lower(), text)
            if isinstance(value, str):
                value = int(value) if key in ("top_k", "seed", "max_tokens") else float(value)
        except ValueError:
            raise InputError(f"{key} cannot be {text!r}", "give a number") from None
        if key == "max_tokens":
            self.talk.max_tokens = limits.check_range(key, value, 1, limits.MAX_NEW_TOKENS)
        else:
            self.talk.sampling = dataclasses.replace(self.talk.sampling, **{key: value})
        self._say(f"{key} = {value}")

    def _say(self, text: str) -> None:
        from merino_edge.cli.console import stderr

        stderr().print(text, style="dim", markup=False, soft_wrap=True)
