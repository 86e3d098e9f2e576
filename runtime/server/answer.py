"""Answers on their way from the worker's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence

from merino_edge.runtime.call_parser import Part
from merino_edge.runtime.generation import Generation
from merino_edge.runtime.server.choice import Choice
from merino_edge.runtime.server.metrics import Metrics
from merino_edge.runtime.server.worker import Job, Worker

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


class Answers:
    """The answers of one request, generated one after the other: others come between them. Sends nothing itself."""

    def __init__(self, choices: Sequence[Choice], cancel: threading.Event, metrics: Metrics, worker: Worker) -> None:
        """Submits the first answer, whose place has been claimed. Raises Stopping."""
        self.cancel, self._choices, self._metrics, self._worker = cancel, choices, metrics, worker
        self._running = self._submitted(choices[0])

    async def parts(self) -> AsyncIterator[tuple[Choice, list[Part] | None]]:
        """More of a choice; [] while nothing comes, None at its end. Raises what ended an answer, and Stopping."""
        for number, choice in enumerate(self._choices):
            if number:
                self._worker.claim_next()
                self._running = self._submitted(choice)
            async for text in self._running.pieces():
                found = choice.push(text) if text else []
                if found or not text:
                    yield choice, found
            if found := choice.finish():
                yield choice, found
            choice.check_is_whole()
            yield choice, None

    async def finish(self) -> None:
        """Wait for all answers. Raises as `parts` does."""
        async for _ in self.parts():
            pass

    def _submitted(self, choice: Choice) -> Answer:
        answer = Answer(choice.generation, self.cancel, self._metrics)
        self._worker.submit(answer.job)
        return answer
