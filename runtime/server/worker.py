"""Worker: the thread that owns the engine. Answers wait in a bounded queue, and as many run as there are sessions.

The worker calls back from this thread: with each piece of text, and once at the end. A place in the queue is claimed
before a request is looked at, since that takes time and memory too. An answer that nobody waits for any more gives its
place up at once. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge.errors import MerinoError
from merino_edge.runtime.generation import Generation
from merino_edge.runtime.server.pace import Pace
from merino_edge.runtime.server.rounds import Rounds
from merino_edge.runtime.shared_sessions import SharedSessions

JOIN_TIMEOUT_SECONDS = 30.0  # for a step that still runs while the worker closes


class Busy(MerinoError):
    """The queue is full."""

    def __init__(self, message: str, hint: str = "ask again in a moment", *, retry_after_s: int = 1) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class Stopping(MerinoError):
    """The server is stopping, so the answer is cut or does not begin."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", "ask again when it runs")


@dataclass(eq=False)
class Job:
    """An answer. Setting `cancel` ends it within one token or one piece of its prompt, or takes it from the queue."""

    generation: Generation
    cancel: threading.Event
    on_piece: Callable[[str], None]
    on_end: Callable[[Exception | None], None]


class Worker:
    """Begins jobs in the order of their arrival. Nothing else may use their sessions meanwhile."""

    def __init__(self, waiting: int, sessions: SharedSessions) -> None:
        """`waiting` is the number of answers that may wait behind the running ones, of which each has a session."""
        self._queue: deque[Job] = deque()
        self._running: set[Job] = set()
        self._rounds, self._pace = Rounds(sessions), Pace(len(sessions))
        self._claimed = 0  # places of requests that are looked at
        self._capacity, self._closed, self._ended = waiting + len(sessions), False, False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """The number of answers that are running or waiting, and of requests that are looked at."""
        waiting = sum(not job.cancel.is_set() for job in self._queue.copy())
        return len(self._running) + waiting + self._claimed

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
                seconds = self._pace.seconds_to_next_end
                raise Busy(f"{self.pending} answers are running or waiting", retry_after_s=seconds)
            self._claimed += 1

    def claim_next(self) -> None:
        """Claim a place for the next answer of a request that had one, however full the queue is. Raises Stopping."""
        with self._lock:
            if self._closed:
                raise Stopping
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
            self._queue.append(job)
            self._changed.notify()

    def cancel_all(self) -> None:
        """End all answers within one token and accept no more."""
        with self._lock:
            self._closed = True
            for job in [*self._queue, *self._running]:
                job.cancel.set()

    def close(self) -> None:
        """Cancel all answers and wait for the thread. May be called twice."""
        self.cancel_all()
        with self._lock:
            self._ended = True
            self._changed.notify()
        self._thread.join(JOIN_TIMEOUT_SECONDS)

    def _run(self) -> None:
        while self._wait():
            for job in self._next_jobs():
                self._begin(job)
            self._rounds.run()

    def _wait(self) -> bool:
        """Wait until there is something to do. False where the worker has ended."""
        with self._lock:
            while not (self._queue or self._running or self._ended):
                self._changed.wait()
            return bool(self._queue or self._running)

    def _next_jobs(self) -> list[Job]:
        """Take the jobs from the queue that nobody waits for, and those that have room to run."""
        taken: list[Job] = []
        with self._lock:
            room = self._rounds.room
            for job in self._queue.copy():
                if job.cancel.is_set() or room > 0:
                    room -= not job.cancel.is_set()
                    self._queue.remove(job)
                    self._running.add(job)
                    taken.append(job)
        return taken

    def _begin(self, job: Job) -> None:
        began_s = time.monotonic()

        def end(failure: Exception | None) -> None:
            self._pace.ended(time.monotonic() - began_s)
            with self._lock:
                self._running.discard(job)
            job.on_end(failure)

        if job.cancel.is_set():
            with contextlib.suppress(BaseException):
                job.generation.close()
            with self._lock:
                self._running.discard(job)
            with contextlib.suppress(BaseException):  # the loop that it tells may be gone
                job.on_end(None)
        else:
            self._rounds.begin(job.generation, job.on_piece, end)
