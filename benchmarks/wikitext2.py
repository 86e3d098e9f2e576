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
MAX_CHARACTERS = 100_000  # of lines encoded at once: a tokenizer refuses a whole corpus


def corpora() -> Path:
    """The folder of texts for language models; ends the program where nobody says."""
    if "MERINO_DATA" not in os.environ:
        sys.exit("set MERINO_DATA to the folder of corpora")
    return Path(os.environ["MERINO_DATA"]) / "lm"


def windows_of_test_text(tokenizer: Tokenizer, count: int, window: int = WINDOW) -> NDArray[np.int64]:
    """The first tokens [N, window] of the text, at most `count` in all (SmolLM2 makes 311,000 of the whole)."""
    text = lzma.decompress((corpora() / "wikitext2_test.txt.xz").read_bytes()).decode()
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > MAX_CHARACTERS:
            pieces.append("")
        pieces[-1] += line
    first, *others = map(tokenizer.encode, pieces)
    begins_with_bos = tokenizer.chat.bos_token_id is not None
    ids = first + [token for piece in others for token in piece[begins_with_bos:]]
    return np.array(ids[: min(count, len(ids)) // window * window], np.int64).reshape(-1, window)
