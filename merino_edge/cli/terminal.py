"""The chat in the terminal: one turn at a time, its statistics, and the loop that obeys /commands.

Answers go to stdout, everything else to stderr. Control characters of a model never reach a terminal."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from merino_edge.cli.word_wrap import WordWrap
from merino_edge.errors import MerinoError

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.chat import Chat
    from merino_edge.runtime.generation import Generation, Statistics


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


def banner(opened: Bundle) -> str:
    """What a chat is held with: model, precision, context and target."""
    from merino_edge import counts

    millions = counts.parameters(opened.architecture) / 1e6
    form = f"{opened.precision}, {opened.context} positions, {opened.target}"
    return f"{opened.path.resolve().name}: {millions:.3g} M parameters, {form}"


def cut_note(answer: Generation, talk: Chat) -> tuple[str, str]:
    """What cut an answer off, and what to do; "" twice where it ended by itself."""
    if answer.finish_reason == "length":
        return f"the answer was cut off after {talk.max_tokens} tokens", "raise --max-tokens"
    if answer.finish_reason == "context":
        context = talk.session.engine.max_positions
        return f"the answer was cut off where the context of {context} positions is full", (
            "shorten the prompt, or export again with a larger --context"
        )
    return "", ""


def run_turn(talk: Chat, text: str, *, quiet: bool = False, wraps: bool = False) -> Generation:
    """Run one turn to its end and write its text as it comes, unless `quiet`; `wraps`: between words on a terminal."""
    # A model must not steer the terminal. So a terminal gets no control characters but newline and tab.
    drop = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}) if sys.stdout.isatty() else {}
    wrap = WordWrap(lambda: shutil.get_terminal_size().columns) if wraps and sys.stdout.isatty() else None
    with interruptible() as cancel:
        answer = talk.send(text, cancel)
        try:
            for piece in answer:
                if not quiet:
                    shown = piece.translate(drop)
                    sys.stdout.write(shown if wrap is None else wrap.push(shown))
                    sys.stdout.flush()
        finally:
            answer.close()
            if not quiet and answer.text:
                sys.stdout.write("" if wrap is None else wrap.finish())
                sys.stdout.write("" if answer.text.endswith("\n") else "\n")
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
    """The interactive chat: reads messages, answers them, and obeys /commands (merino_edge.cli.chat_commands)."""

    def __init__(self, talk: Chat, load_ms: float, *, verbose: bool) -> None:
        from merino_edge.cli.chat_commands import ChatCommands
        from merino_edge.cli.message_reader import MessageReader

        self.talk, self.load_ms, self.verbose = talk, load_ms, verbose
        self._commands = ChatCommands(talk, self._say, lambda: self._print_statistics(verbose=True))
        self._reader = MessageReader(self._commands.complete)

    def run(self, title: str) -> None:
        """Read and answer until /exit or Ctrl-D. A refused turn prints one line.

        Ctrl-C at the prompt drops what was typed. Raises KeyboardInterrupt at the second one in a row.
        """
        from merino_edge.cli.chat_commands import LEAVING

        self._say(f"{title}; /help lists the commands, /exit leaves")
        was_interrupted = False
        with suppress(EOFError):
            while True:
                try:
                    text = self._reader.read()
                    was_interrupted = False
                    if text in LEAVING:
                        return
                    if text.startswith("/"):
                        self._commands.obey(text)
                    elif text:
                        self._ask(text)
                except KeyboardInterrupt:
                    if was_interrupted:
                        raise
                    was_interrupted = True
                    sys.stderr.write("\n")
                    self._say("Ctrl-C again, Ctrl-D or /exit leaves")
                except MerinoError as error:
                    self._say(str(error))

    def _ask(self, text: str) -> None:
        answer = run_turn(self.talk, text, wraps=self._commands.wrap)
        self._print_statistics(verbose=self.verbose)
        if self.talk.dropped:
            self._say(f"the {self.talk.dropped} oldest messages no longer fit the context and were dropped")
        if answer.finish_reason == "context":
            hint = "" if self.talk.truncate_history else "; /reset starts a new conversation, or /set slide true"
            self._say(f"the context is full{hint}")
        elif answer.finish_reason == "length":
            self._say(f"{cut_note(answer, self.talk)[0]}; /set max_tokens N gives more")

    def _print_statistics(self, *, verbose: bool) -> None:
        if self.talk.turn is not None:
            print_statistics(self.talk.turn.statistics, self.load_ms, verbose=verbose)

    def _say(self, text: str) -> None:
        from merino_edge.cli.console import stderr

        stderr().print(text, style="dim", markup=False, soft_wrap=True)
