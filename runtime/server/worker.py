"""Worker: the thread that owns the engine. Answers wait in a bounded queue and are generated one after the other.

An engine holds one sequence, and the next prompt reuses the prefix that is in its cache. The worker calls back from
this thread: with each piece of text, and once at the end. Knows no HTTP.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge.errors import MerinoError
from merino_edge.runtime.generation import Generation

JOIN_TIMEOUT_SECONDS = 30.0  # for a step that still runs while the worker closes


class Busy(MerinoError):
    """The queue is full."""


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
        self._lock, self._capacity, self._closed = threading.Lock(), waiting + 1, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """The number of answers that are running or waiting."""
        return len(self._pending)

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises Busy where it is full; the job is then not called back."""
        with self._lock:
            if self._closed or len(self._pending) >= self._capacity:
                raise Busy(f"{len(self._pending)} answers are running or waiting", "ask again in a moment")
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
            finally:
                job.generation.close()
                with self._lock:
                    del self._pending[id(job)]
            job.on_end(failure)
