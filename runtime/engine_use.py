"""Who uses an engine: one session at a time, and of that one thread at a time. Others raise EngineInUseError.

An engine has one KV cache. A second session would overwrite what the first believes to be in it, and both would answer
with each other's text. So the session that runs first has the engine until it is closed, or until nothing refers to it
any more.
"""

from __future__ import annotations

import gc
import threading
import weakref

from merino_edge.errors import EngineInUseError
from merino_edge.runtime.engine import Engine

OTHER_SESSION = "close() that session or chat (and answers that you did not read to the end), or open the bundle again"
OTHER_THREAD = "let one thread at a time use a session, or open the bundle once for each thread"

_OWNERS: weakref.WeakKeyDictionary[Engine, weakref.ref[EngineUse]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()  # of _OWNERS


class EngineUse:
    """A session's hold on its engine. `with use:` surrounds whatever runs on the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running = threading.Lock()

    def __enter__(self) -> None:
        """Take the engine. Raises EngineInUseError where another session has it, or another thread runs in this one."""
        if not self._running.acquire(blocking=False):
            raise EngineInUseError("another thread is running an answer in this session", OTHER_THREAD)
        try:
            if not self._take():
                gc.collect()  # a session that nobody can reach any more has no claim
                if not self._take():
                    raise EngineInUseError("this engine belongs to another session", OTHER_SESSION)
        except BaseException:
            self._running.release()
            raise

    def __exit__(self, *error: object) -> None:
        self._running.release()

    def _take(self) -> bool:
        with _LOCK:
            owner = _OWNERS.get(self._engine)
            owned_by = None if owner is None else owner()
            if owned_by is None:
                _OWNERS[self._engine] = weakref.ref(self)
            return owned_by is None or owned_by is self

    def give_back(self) -> None:
        """Let another session have the engine. Nothing happens where this one does not have it."""
        with _LOCK:
            owner = _OWNERS.get(self._engine)
            if owner is not None and owner() is self:
                del _OWNERS[self._engine]
