"""The /commands of the chat in the terminal: /set and its values, /save and /load, /stats, /reset, /help."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merino_edge.errors import InputError

if TYPE_CHECKING:
    from merino_edge.runtime.chat import Chat

HELP = """\
/set KEY VALUE   change {keys}
/set             show their values
/save FILE       write the conversation to a new file
/load FILE       go on with a conversation that /save wrote
/stats           times of the last answer
/reset           start a new conversation
/help, /?        this list
/exit            leave (also /bye and Ctrl-D); Ctrl-C ends an answer
\"\"\"              begins and ends a message of several lines; so does a backslash at the end of a line"""
LEAVING = ("/exit", "/bye", "/quit")
COMMANDS = ("/set", "/save", "/load", "/stats", "/reset", "/help", "/?", "/exit", "/bye")
WHOLE = ("top_k", "seed", "max_tokens")
SWITCHES = ("greedy", "slide", "wrap")
WORDS: dict[str, Any] = {"true": True, "on": True, "false": False, "off": False, "none": None}


class ChatCommands:
    """Obeys commands of one chat. `wrap` is the terminal's own setting."""

    def __init__(self, talk: Chat, say: Callable[[str], None], statistics: Callable[[], None]) -> None:
        """`say` prints a line for the person, `statistics` the times of the last answer."""
        self.talk, self.wrap = talk, True
        self._say, self._statistics = say, statistics
        fields = [field.name for field in dataclasses.fields(talk.sampling) if field.name != "logit_bias"]
        self.keys = [*fields, "max_tokens", "slide", "wrap"]

    def obey(self, text: str) -> None:
        """Obey a command, which begins with a slash. Raises InputError and what reading and writing files raises."""
        command, _, argument = text.partition(" ")
        argument = argument.strip()
        if command in ("/help", "/?"):
            self._say(HELP.format(keys=", ".join(self.keys)))
        elif command == "/reset":
            self.talk.reset()
            self._say("new conversation")
        elif command == "/stats":
            if self.talk.turn is None:
                raise InputError("no answer yet", "ask something")
            self._statistics()
        elif command == "/set" and not argument:
            self._say("\n".join(f"{key:<19} {_written(self._value(key))}" for key in self.keys))
        elif command == "/set":
            self._set(argument)
        elif command in ("/save", "/load"):
            if not argument:
                raise InputError(f"{command} needs a file", f"{command} FILE")
            path = Path(os.path.expanduser(argument))
            self._save(path) if command == "/save" else self._load(path)
        else:
            raise InputError(f"unknown command {command}", "/help lists the commands")

    def complete(self, line: str) -> Sequence[str]:
        """What the word at the end of `line` may become."""
        words = line.split(" ")
        if len(words) == 1:
            return [f"{command} " for command in COMMANDS] if line.startswith("/") else []
        if words[0] == "/set" and len(words) == 2:
            return [f"{key} " for key in self.keys]
        if words[0] in ("/save", "/load"):
            head, _ = os.path.split(words[-1])
            try:
                names = sorted(os.listdir(os.path.expanduser(head) or "."))
            except OSError:
                return []
            return [os.path.join(head, name) for name in names]
        return []

    def _value(self, key: str) -> Any:
        own = {"max_tokens": self.talk.max_tokens, "slide": self.talk.truncate_history, "wrap": self.wrap}
        return own[key] if key in own else getattr(self.talk.sampling, key)

    def _set(self, argument: str) -> None:
        from merino_edge import limits

        key, _, text = argument.replace("=", " ", 1).partition(" ")
        text = text.strip()
        if not text or key not in self.keys:
            raise InputError(f"cannot set {argument!r}", f"/set KEY VALUE with one of {', '.join(self.keys)}")
        try:
            value: Any = WORDS.get(text.lower(), text)
            if isinstance(value, str):
                value = int(value) if key in WHOLE else float(value)
        except ValueError:
            raise InputError(f"{key} cannot be {text!r}", "give a number") from None
        if key in SWITCHES and not isinstance(value, bool):
            raise InputError(f"{key} cannot be {text!r}", "give true or false")
        if key == "max_tokens":
            self.talk.max_tokens = limits.check_range(key, value, 1, limits.MAX_NEW_TOKENS)
        elif key == "slide":
            self.talk.truncate_history = value
        elif key == "wrap":
            self.wrap = value
        else:
            self.talk.sampling = dataclasses.replace(self.talk.sampling, **{key: value})
        self._say(f"{key} = {_written(value)}")

    def _save(self, path: Path) -> None:
        from merino_edge.runtime import saved_chat

        self._say(f"{saved_chat.save(path, self.talk.messages)} messages are in {path}")

    def _load(self, path: Path) -> None:
        from merino_edge.runtime import saved_chat

        self.talk.resume(saved_chat.load(path))
        self._say(f"the conversation goes on after {len(self.talk.messages)} messages")


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
