"""merino-edge as a peer: the bundle's engine, greedy by numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from worker import serve

from merino_edge.runtime.open_bundle import open_engine


class Ours:
    def __init__(self, path: Path, threads: int) -> None:
        self.engine, _, _ = open_engine(path, threads)
        self.version = f"onnxruntime {onnxruntime.__version__}"

    def run(self, tokens: list[int], start: int) -> int:
        return int(self.logits(tokens, start).argmax())

    def logits(self, tokens: list[int], start: int) -> Any:
        return self.engine.forward(np.asarray(tokens, np.int64), start)


if __name__ == "__main__":
    serve(Ours)
