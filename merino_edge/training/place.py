"""Where a training writes, and whether one is finished there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from merino_edge import atomic, checkpoint
from merino_edge.data.corpus import Corpus
from merino_edge.errors import ArtefactError
from merino_edge.kind import what_is
from merino_edge.training import state
from merino_edge.training.distributed import Workers


class Place:
    """Where a training writes: `folder` is `out`, or becomes it at the first save where a checkpoint stands there."""

    def __init__(self, out: Path, workers: Workers, *, begins: bool) -> None:
        replaces = begins and workers.is_main and what_is(out) is not None
        name = str(atomic.hidden_name(Path(out).resolve()) if replaces else out)
        self.is_main = workers.is_main
        self.out, self.folder = out, Path(workers.from_main(name) if begins else name)

    def publish(self, corpus: Corpus) -> Corpus:
        """Give the folder its name; the checkpoint that had it is gone only then. Returns the corpus, where it is now.

        Raises OutputError.
        """
        if self.folder == self.out:
            return corpus
        if self.is_main:
            with atomic.translate_os_errors(self.out):
                atomic.publish(self.folder, self.out.resolve())
            atomic.remove(self.folder)
        if corpus.folder.is_relative_to(self.folder):
            corpus = dataclasses.replace(corpus, folder=self.out / corpus.folder.relative_to(self.folder))
        self.folder = self.out
        return corpus


def finished(out: Path) -> dict[str, Any] | None:
    """The content of training.json where `out` holds a training that has reached its last step."""
    try:
        done = None if state.exists(out) else checkpoint.record(out)
        return done if done and done.get("source") == "train" and done["step"] == done["config"]["steps"] else None
    except (ArtefactError, KeyError, TypeError):
        return None
