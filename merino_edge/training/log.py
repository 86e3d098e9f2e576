"""The training log: CKPT/log.jsonl with one line per logged step, and optionally TensorBoard's format.

    {"step": 20, "tokens": 40960, "loss": 6.31, "learning_rate": 0.0012, "gradient_norm": 0.93,
     "tokens_per_second": 7100.0, "mfu": 0.31, "validation_loss": 6.9}

At most about 10,000 steps are logged, evenly spread. When a killed training resumes, lines after the saved step and a
broken last line are dropped. So the log reads as if the training had not been interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from merino_edge import atomic
from merino_edge.errors import require
from merino_edge.training.state import LOG
from merino_edge.training.train import Progress

LINES = 10_000


class TrainingLog:
    """The log files, as a context manager that closes them. `record` writes a step."""

    def __init__(self, out: Path, steps: int, done: int = 0, tensorboard: Path | None = None) -> None:
        """Open the log of a training into `out` that has done `done` of `steps` steps.

        Raises MissingExtraError, OutputError.
        """
        self._every = max(1, steps // LINES)
        path = out / LOG
        kept = _lines_until(path, done) if done else []
        atomic.write_bytes(path, "".join(kept).encode())
        with atomic.translate_os_errors(path):
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by __exit__
        self._board: Any = None
        if tensorboard is not None:
            require("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            with atomic.translate_os_errors(tensorboard):
                self._board = SummaryWriter(str(tensorboard), purge_step=done + 1)  # type: ignore[no-untyped-call]

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def record(self, p: Progress, tokens: int, mfu: float | None) -> None:
        """Log a step, unless it falls between two logged ones. `tokens` is the number trained on so far."""
        if p.step > 1 and p.step % self._every:
            return
        values = {
            "step": p.step,
            "tokens": tokens,
            "loss": p.loss,
            "learning_rate": p.learning_rate,
            "gradient_norm": p.gradient_norm,
            "tokens_per_second": p.tokens_per_second,
            "mfu": mfu,
            "validation_loss": p.validation_loss,
        }
        self._file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name not in ("step", "tokens") and value is not None:
                    self._board.add_scalar(name, value, p.step)


def _lines_until(path: Path, step: int) -> list[str]:
    """The complete lines of steps up to `step`."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    return kept
