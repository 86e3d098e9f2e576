"""Conversations in files: what is saved is loaded, nothing is overwritten, and other files are refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from merino_edge.data.records import Conversation, parse_line
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.runtime import saved_chat

TALK = [{"role": "user", "content": "Grüße 🦊\n"}, {"role": "assistant", "content": "Hi"}]


def test_what_is_saved_is_loaded_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    assert saved_chat.save(path, TALK) == 2
    assert saved_chat.load(path) == TALK
    record = parse_line(path.read_text(), "line 1")  # training reads it too
    assert isinstance(record, Conversation) and list(record.messages) == TALK
    for taken in (path, tmp_path):
        with pytest.raises(OutputError, match="exists; choose another name"):
            saved_chat.save(taken, TALK)
    with pytest.raises(InputError, match="no message yet"):
        saved_chat.save(tmp_path / "empty", [])
    with pytest.raises(OutputError):
        saved_chat.save(path / "below", TALK)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"messages": []}', '{"messages": [1]}', '{"messages": [{"role": "user"}]}', "\x00"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=str(path)):
        saved_chat.load(path)
    path.write_text(json.dumps({"messages": TALK * 1000}))
    with pytest.raises(ArtefactError, match="1024 messages"):
        saved_chat.load(path)
    with pytest.raises(ArtefactError):
        saved_chat.load(tmp_path)
    with pytest.raises(ArtefactError):
        saved_chat.load(tmp_path / "none")
