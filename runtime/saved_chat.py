"""A conversation in a file, as a line of JSON that `train` and other programs read too.

{"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merino_edge import artefact, limits
from merino_edge.errors import ArtefactError, InputError, OutputError

AGAIN = "give a file that /save wrote"


def save(path: Path, messages: Sequence[Mapping[str, Any]]) -> int:
    """Write the messages to a new file, which appears whole or not at all, and return how many there are.

    Raises InputError where there are none, OutputError where something stands at `path` or it cannot be written.
    """
    if not messages:
        raise InputError("there is no message yet", "ask something")
    if os.path.lexists(path):
        raise OutputError(f"{path} exists", "choose another name")
    artefact.write_text(path, json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n")
    return len(messages)


def load(path: Path) -> list[dict[str, Any]]:
    """The messages of a file. Raises ArtefactError where it cannot be read or holds no conversation."""
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise ArtefactError(f"{path} is not a plain file", AGAIN)
    document = artefact.parse_json(artefact.read_text(path, limits.MAX_REQUEST_BYTES), str(path))
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list) or not 0 < len(messages) <= limits.MAX_MESSAGES:
        raise ArtefactError(f"{path} has no list of 1 to {limits.MAX_MESSAGES} messages", AGAIN)
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ArtefactError(f"{path} has a message without role and text", AGAIN)
    return messages
