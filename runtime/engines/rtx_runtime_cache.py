"""The runtime cache of TensorRT for RTX: the kernels that it compiled for this GPU, one cache for the process.

TensorRT for RTX finishes an engine's kernels where they run. Without a cache it does so for every context, at every
start, and again in mid-answer when a sequence moves to a larger engine. The cache lies in the engine store between
starts. The library refuses one of another release, driver or GPU, and then begins an empty one.

It is saved where it has grown: when an engine is opened or closed, and after a few steps, since a server may be killed.
"""

from __future__ import annotations

import atexit
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from merino_edge import artefact, engine_store
from merino_edge.errors import OutputError

# The library compiles some kernels while steps run. To look whether it did takes a copy of the cache, so that is done
# after the first step, and then each time that there were so many times as many.
TIMES_AS_MANY = 16


@cache
def process_cache(version: str, capability: str) -> RtxRuntimeCache:
    """The cache of this process for a release of the library and a GPU."""
    mine = RtxRuntimeCache(engine_store.store_folder() / f"rtx-runtime-{version}-{capability}.bin")
    atexit.register(mine.save)  # for an engine that nobody closed
    return mine


class RtxRuntimeCache:
    """A cache that is read from the file `path`, and written there by `save`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None
        self._saved_bytes = 0
        self._steps, self._next_save = 0, 1
        self._lock = threading.Lock()  # a server opens engines in its own thread

    def attach(self, runtime_config: Any, log: Any) -> None:
        """Let the contexts of a config use the cache. The first config makes it."""
        with self._lock:
            if self._cache is None:
                self._cache = runtime_config.create_runtime_cache()
                with suppress(OSError):
                    content = self.path.read_bytes()
                    self._saved_bytes = len(content) if self._cache.deserialize(content) else 0
                    log.forget()  # a cache that was refused is no reason of a later failure
            runtime_config.set_runtime_cache(self._cache)

    def count_step(self) -> None:
        """Note that a step has run, and save the cache after some of them."""
        self._steps += 1
        if self._steps >= self._next_save:
            self._next_save *= TIMES_AS_MANY
            self.save()

    def save(self) -> None:
        """Write the cache if it has grown. A disk that refuses it costs only the time of the next start."""
        with self._lock:
            if self._cache is None:
                return
            content = bytes(self._cache.serialize() or b"")
            if len(content) > self._saved_bytes:
                self._saved_bytes = len(content)
                with suppress(OutputError):
                    artefact.write_bytes(self.path, content)
