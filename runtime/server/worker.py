"""The thread that owns the engine: answers wait in a bounded queue and are made one after the other.

An engine holds one sequence, and what the last one left in its cache is found by the next that begins alike. Knows no
HTTP. Whoever submits an answer is called back from this thread: with each piece of text, and once at the end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge.errors import MerinoError
from merino_edge.runtime.generation import Generation

PATIENCE_SECONDS = 30.0  # for a step that runs while the worker closes


class Busy(MerinoError):
    """As many answers wait as may."""


@dataclass
class Job:
    """An answer that somebody waits for. `cancel` ends it within one token, or takes it out of the queue."""

    generation: Generation
    cancel: threading.Event
    on_piece: Callable[[str], None]
    on_end: Callable[[Exception | None], None]


class Worker:
    """Runs jobs in the order they come. Nothing else may use their engine meanwhile."""

    def __init__(self, waiting: int) -> None:
        """`waiting`: answers that may wait behind the one that is made."""
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._all: dict[int, Job] = {}  # by their id()
        self._lock, self._room, self._closed = threading.Lock(), waiting + 1, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Answers that are made or wait."""
        return len(self._all)

    def submit(self, job: Job) -> None:
        """Raises Busy; the job is then not called back."""
        with self._lock:
            if self._closed or len(self._all) >= self._room:
                raise Busy(f"{len(self._all)} answers are made or wait", "ask again in a moment")
            self._all[id(job)] = job
            self._jobs.put(job)

    def cancel_all(self) -> None:
        """End every answer within a token and take no more."""
        with self._lock:
            self._closed = True
            for job in self._all.values():
                job.cancel.set()

    def close(self) -> None:
        """As `cancel_all`, and wait for the thread. May be called twice."""
        self.cancel_all()
        self._jobs.put(None)
        self._thread.join(PATIENCE_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            failure: Exception | None = None
            try:
                if not job.cancel.is_set():
                    for piece in job.generation:
                        job.on_piece(piece)
            except Exception as error:  # this answer's, and no reason to refuse the others
                failure = error
            finally:
                job.generation.close()
                with self._lock:
                    del self._all[id(job)]
            job.on_end(failure)
