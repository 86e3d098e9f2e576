"""Weights as a safetensors file, written from the memory in which they are: large models have no room for a copy."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from merino_edge import artefact, atomic

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def new_file(path: Path, weights: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> Iterator[str]:
    """Write `weights` to a hidden file and yield its sha256; then it gets the name `path`, whatever file has it.

    An error within the block leaves the old file. Raises OutputError, MissingExtraError.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    whole = {name: np.ascontiguousarray(array) for name, array in weights.items()}  # copies none that is so already
    with atomic.replacing(path) as hidden:
        try:
            save_file(whole, hidden, metadata)
        except SafetensorError as error:
            if number := SYSTEM_ERROR.search(str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise OSError(str(error)) from None
        yield artefact.sha256_file(hidden)
