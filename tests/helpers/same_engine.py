"""Another name of an engine. An engine belongs to one session: a test that wants a second one on it says so."""

from __future__ import annotations

from typing import Any


class SameEngine:
    """Does whatever `engine` does."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
