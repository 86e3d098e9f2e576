"""WikiText-2's test text as windows of tokens, from the folder that MERINO_DATA names."""

from __future__ import annotations

import lzma
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merino_edge.tokenizer import Tokenizer

WINDOW = 1024
MAX_CHARACTERS = 1_000_000  # more than a tokenizer takes at once is refused


def corpora() -> Path:
    """The folder of texts for language models; ends the program where nobody says."""
    if "MERINO_DATA" not in os.environ:
        sys.exit("set MERINO_DATA to the folder of corpora")
    return Path(os.environ["MERINO_DATA"]) / "lm"


def windows_of_test_text(tokenizer: Tokenizer, count: int, window: int = WINDOW) -> NDArray[np.int64]:
    """The first tokens [N, window] of the text, at most `count` in all."""
    text = lzma.decompress((corpora() / "wikitext2_test.txt.xz").read_bytes()).decode()
    ids = tokenizer.encode(text[:MAX_CHARACTERS])
    return np.array(ids[: min(count, len(ids)) // window * window], np.int64).reshape(-1, window)
