"""Connections of the server: one whose request does not arrive is closed, and there are never too many.

uvicorn gives a connection that is half-way through a request all the time it wants. Here its head has HEAD_SECONDS.
Where there are too many connections, the oldest one whose request has not arrived makes room for a new one. So clients
that send nothing cannot keep others out, and the process keeps handles for its files.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for the head of a request to arrive
MAX_CONNECTIONS = 1_000
HANDLES_SHARE = 0.5  # of the process's file handles that may be connections


def most_connections() -> int:
    """How many connections there may be: half of the file handles of this process."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = handles == resource.RLIM_INFINITY
    return MAX_CONNECTIONS if unlimited else max(1, min(MAX_CONNECTIONS, int(handles * HANDLES_SHARE)))


class Connection(H11Protocol):
    """A connection of uvicorn that waits for a request no longer than HEAD_SECONDS."""

    _timer: asyncio.TimerHandle | None = None

    @property
    def has_whole_request(self) -> bool:
        """Whether a whole request has arrived that is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        if len(others) >= most_connections():
            waiting = [other for other in others if not other.has_whole_request]
            oldest = min(waiting, key=lambda other: other._begun, default=self)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock where the head of a request is awaited, and stop it where one has arrived."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._timer is None:
            self._begun = self.loop.time()
            self._timer = self.loop.call_later(HEAD_SECONDS, self._expire)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def config(application: Any, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration for our application. Bad requests of clients are not logged."""
    return uvicorn.Config(application, http=Connection, ws="none", log_level="error", access_log=False, **options)
