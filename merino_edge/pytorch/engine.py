"""The PyTorch engine: runs a `Model` with its static KV cache, one sequence on the CPU or a GPU.

It implements merino_edge.runtime.engine.Engine in eager mode. Exported graphs are compared with it. fp16 means
weights, activations and cache in float16. PyTorch has one number of threads for the process, set by the last engine
that was opened. The CUDA side was not run on a GPU yet.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from merino_edge.errors import InputError, UnsupportedError
from merino_edge.pytorch.model import KVCache, Model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
PROMPT_GRID = 128  # tokens of a piece of a prompt


class TorchEngine:
    """Runs a `Model`. It takes the model over: moved to `device`, cast to `precision`."""

    def __init__(self, model: Model, precision: str = "fp32", threads: int | None = None, device: str = "cpu") -> None:
        """Raises UnsupportedError for a precision that is none of DTYPES, or where PyTorch finds no GPU."""
        if precision not in DTYPES:
            raise UnsupportedError(f"PyTorch runs no {precision} here", f"choose one of: {', '.join(DTYPES)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError(
                f"PyTorch {torch.__version__} finds no CUDA GPU",
                "install its build for this CUDA version, or use the CPU",
            )
        if threads is not None:
            torch.set_num_threads(threads)
        a = model.architecture
        self.vocab_size, self.max_positions, self.max_rows = a.vocab_size, a.max_positions, a.max_positions
        self.prompt_grid = PROMPT_GRID
        self._device, self._length = torch.device(device), 0
        self._model: Model | None = model.eval().to(self._device, DTYPES[precision])
        self._cache: KVCache | None = KVCache(a, dtype=DTYPES[precision], device=self._device)

    def forward(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Run tokens [T] at positions start.. and return the logits [V] of the last one.

        `start` may go back (rewind), but not beyond the filled positions. Raises InputError.
        """
        return np.asarray(self.forward_rows(tokens, start, 1)[0])

    def forward_rows(self, tokens: NDArray[np.int64], start: int, rows: int) -> NDArray[np.float32]:
        """As `forward`, but with the logits [rows, V] of the last `rows` positions."""
        if self._model is None:
            raise InputError("this engine is closed", "open the model again")
        if start > self._length:
            raise InputError(f"cannot run tokens at position {start} of {self._length}", "start lower")
        if not 1 <= rows <= max(1, len(tokens)):
            raise InputError(f"cannot give {rows} rows of logits of {len(tokens)} tokens", "ask for fewer")
        with torch.inference_mode():
            ids = torch.tensor(tokens, dtype=torch.int64, device=self._device)
            logits = self._model(ids[None], self._cache, start, last_only=rows == 1)  # [1, T or 1, V]
        self._length = start + len(tokens)
        return logits[0, -rows:].float().numpy(force=True)  # type: ignore[no-any-return]

    def mark_filled(self, positions: int) -> None:
        """Treat this many cache positions as filled, whatever they hold. So a step is timed without its prompt."""
        self._length = positions

    def close(self) -> None:
        """Free the model and the cache. May be called twice."""
        self._model = self._cache = None
