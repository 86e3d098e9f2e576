"""Worker: the thread that owns the engine. Answers wait in a bounded queue and are generated one after the other.

An engine holds one sequence, and the next prompt reuses the prefix that is in its cache. The worker calls back from
this thread: with each piece of text, and once at the end. A place in the queue is claimed before a request is looked
at, since that takes time and memory too. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge.errors import MerinoError
from merino_edge.runtime.generation import Generation

JOIN_TIMEOUT_SECONDS = 30.0  # for a step that still runs while the worker closes


class Busy(MerinoError):
    """The queue is full."""


class Stopping(MerinoError):
    """The server is stopping, so the answer is cut or does not begin."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", "ask again when it runs")


@dataclass
class Job:
    """An answer in the queue. Setting `cancel` ends it within one token, or removes it from the queue."""

    generation: Generation
    cancel: threading.Event
    on_piece: Callable[[str], None]
    on_end: Callable[[Exception | None], None]


class Worker:
    """Runs jobs in the order of their arrival. Nothing else may use their engine meanwhile."""

    def __init__(self, waiting: int) -> None:
        """`waiting` is the number of answers that may wait behind the running one."""
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._pending: dict[int, Job] = {}  # by their id()
        self._claimed = 0  # places of requests that are looked at
        self._lock, self._capacity, self._closed = threading.Lock(), waiting + 1, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """The number of answers that are running or waiting, and of requests that are looked at."""
        return len(self._pending) + self._claimed

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def claim(self) -> None:
        """Claim a place in the queue; `submit` or `release` must follow. Raises Busy where it is full, and Stopping."""
        with self._lock:
            if self._closed:
                raise Stopping
            if self.pending >= self._capacity:
                raise Busy(f"{self.pending} answers are running or waiting", "ask again in a moment")
            self._claimed += 1

    def release(self) -> None:
        """Give a claimed place back."""
        with self._lock:
            self._claimed -= 1

    def submit(self, job: Job) -> None:
        """Put a job into a claimed place. Raises Stopping where the worker has been closed."""
        with self._lock:
            self._claimed -= 1
            if self._closed:
                raise Stopping
            self._pending[id(job)] = job
            self._jobs.put(job)

    def cancel_all(self) -> None:
        """End all answers within one token and accept no more."""
        with self._lock:
            self._closed = True
            for job in self._pending.values():
                job.cancel.set()

    def close(self) -> None:
        """Cancel all answers and wait for the thread. May be called twice."""
        self.cancel_all()
        self._jobs.put(None)
        self._thread.join(JOIN_TIMEOUT_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            failure: Exception | None = None
            try:
                if not job.cancel.is_set():
                    for piece in job.generation:
                        job.on_piece(piece)
            except Exception as error:  # concerns this answer only: the others still run
                failure = error
            except BaseException as error:  # a panic, say: it must not end this thread either
                failure = RuntimeError(f"{type(error).__name__}: {error}")
            with contextlib.suppress(BaseException):
                job.generation.close()
            with self._lock:
                del self._pending[id(job)]
            with contextlib.suppress(BaseException):  # the loop that it tells may be gone
                job.on_end(failure)
