"""What an interrupted command has done: parts in a hidden folder beside its output, for `--continue`.

    .NAME.unfinished/parts.jsonl    {"key": hash of all that the work depends on}, then a line for each finished part:
                                    {"part": name, "value": JSON, "sha256": of both}
                     ...            files of the command

The folder stays after a kill or a Ctrl-C. It goes when the command ends, in success or with an error, and when a run
begins anew or from other inputs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from merino_edge import artefact, atomic
from merino_edge.errors import Interrupted

PARTS = "parts.jsonl"
HINT = "add --continue to the same command, and it goes on"


class Unfinished:
    """The finished parts of a command that writes `out`; a context that ends with the command."""

    def __init__(self, out: Path | str, key: Any, *, resume: bool) -> None:
        """`key` is all that the work depends on, as JSON. What another key left is removed. Raises OutputError."""
        out = Path(os.path.realpath(out))
        self.folder = out.with_name(f".{atomic.short(out.name)}.unfinished")
        self.key = artefact.sha256_text(artefact.canonical_json(key))
        self.parts: dict[str, Any] = self._read() if resume else {}
        if not self.parts:
            atomic.remove(self.folder)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a part: that of the interrupted run, or else what `make` returns. Raises OutputError."""
        if name not in self.parts:
            self.add(name, make())
        return self.parts[name]

    def add(self, name: str, value: Any) -> None:
        """Note a finished part. Raises OutputError."""
        lines = [] if self.parts else [{"key": self.key}]
        line = {"part": name, "value": value}
        lines.append({**line, "sha256": artefact.sha256_text(artefact.canonical_json(line))})
        with atomic.translate_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / PARTS, "a", encoding="utf-8") as file:
                file.writelines(artefact.canonical_json(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        self.parts[name] = value

    def _read(self) -> dict[str, Any]:
        """The parts of the same work. A line that was cut ends them, and is removed."""
        parts: dict[str, Any] = {}
        kept = 0
        try:
            content = (self.folder / PARTS).read_bytes()
            for number, line in enumerate(content.splitlines(keepends=True)):
                entry = json.loads(line)
                if number == 0:
                    if entry != {"key": self.key}:
                        return {}
                else:
                    sha256 = entry.pop("sha256")
                    if not line.endswith(b"\n") or sha256 != artefact.sha256_text(artefact.canonical_json(entry)):
                        break
                    parts[entry["part"]] = entry["value"]
                kept += len(line)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        if parts:
            with atomic.translate_os_errors(self.folder):
                os.truncate(self.folder / PARTS, kept)
        return parts

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt) and self.parts:
            raise Interrupted("interrupted", HINT) from None
        atomic.remove(self.folder)
