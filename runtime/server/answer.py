"""An answer on its way from the worker's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from merino_edge.runtime.generation import Generation
from merino_edge.runtime.server.metrics import Metrics
from merino_edge.runtime.server.worker import Job

PING_SECONDS = 2.0  # of silence, before a stream says that it still waits: proxies cut a silent one


class Answer:
    """The event loop's side of a job: receives its pieces from the worker's thread."""

    def __init__(self, generation: Generation, cancel: threading.Event, metrics: Metrics) -> None:
        self.cancel = cancel
        loop = asyncio.get_running_loop()
        self._received = asyncio.Queue[str | Exception | None]()  # None: the answer has ended

        def put(item: str | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._received.put_nowait, item)

        def end(failure: Exception | None) -> None:
            metrics.generated(generation.statistics)
            put(failure)

        self.job = Job(generation, cancel, on_piece=put, on_end=end)

    async def pieces(self) -> AsyncIterator[str]:
        """All pieces received since the last one, joined; "" while none arrives. Raises what ended the answer."""
        while True:
            getting = asyncio.ensure_future(self._received.get())
            try:
                while not (await asyncio.wait({getting}, timeout=PING_SECONDS))[0]:
                    yield ""
            finally:
                getting.cancel()  # has no effect on what has been received
            items = [getting.result()]
            while not self._received.empty():
                items.append(self._received.get_nowait())
            if text := "".join(piece for piece in items if isinstance(piece, str)):
                yield text
            if isinstance(items[-1], Exception):
                raise items[-1]
            if items[-1] is None:
                return

    async def text(self) -> str:
        """The whole text, once the answer has ended. Raises the error that ended it."""
        return "".join([piece async for piece in self.pieces()])
