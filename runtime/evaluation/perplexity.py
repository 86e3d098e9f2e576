"""Perplexity of a whole text, token by token, in windows that move by a stated stride.

An entry `perplexity` of a report (merino_edge.runtime.evaluation.harness):

    {"file", "text_sha256", "bytes", "words", "tokens", "window", "stride", "metrics": {"token_perplexity": {"value",
     "stderr"}, "word_perplexity", "bits_per_byte"}, "per_window": [[sum of log p, tokens], ...], "seconds"}

Every token is scored once. The first window scores all of its tokens, after what begins a text; each further one the
next `stride`, after as many before them as fill it. A stride of the window's length is windows that have one token in
common, but for the last, which reaches back to be full; a smaller one costs as many times more, and each token has
`window - stride` before it at least. A word is what stands between white space. Spread is over windows. Figures per
token compare models of one tokenizer only, the others any.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from merino_edge import artefact, limits
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.evaluation.harness import EngineLM, resampled, standard_error, value_of
from merino_edge.statistics import percentile_interval
from merino_edge.tokenizer import Tokenizer

KEY = "perplexity"
UNITS = {"token_perplexity": "tokens", "word_perplexity": "words", "bits_per_byte": "bytes"}
Pair = tuple[list[int], list[int]]


def read_text(path: Path) -> str:
    """A UTF-8 text file, plain or `.xz`, as it is. Raises InputError."""
    try:
        data = path.read_bytes()
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})", "give --perplexity a text file") from None
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no text, plain or .xz ({error})", "give --perplexity a text file") from None


def sizes(places: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride: as said, or the context of `places`, and half of a window. Raises InputError."""
    window = limits.check_range("window", places if window is None else window, 1, places)
    return window, limits.check_range("stride", max(1, window // 2) if stride is None else stride, 1, window)


def windows(ids: Sequence[int], before: int, window: int, stride: int) -> Iterator[Pair]:
    """Of the tokens `ids`, which `before` precedes: what is given and what is scored, together at most `window` + 1."""
    # The harness's: `context_len` of each is scored already.
    pairs = get_rolling_token_windows(list(ids), before, window, window - stride + 1)
    return map(make_disjoint_window, pairs)


def perplexity(
    path: Path,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    window: int | None,
    stride: int | None,
    on_step: Callable[[int, int], None],
) -> dict[str, Any]:
    """The report's entry for the text in `path`; `on_step` is told how many tokens of how many are scored.

    Raises InputError: no text, an empty one, or a window that the engine's context has no room for.
    """
    began = time.perf_counter()
    window, stride = sizes(engine.max_positions, window, stride)
    text = read_text(path)
    ids = list(tokenizer.backend.encode(text, add_special_tokens=False).ids)  # at once: no seams
    words = len(text.split())
    if not words or not ids:
        raise InputError(f"{path} has no words", "give --perplexity a text file")
    entry: dict[str, Any] = {"file": path.name, "text_sha256": artefact.sha256_text(text), "bytes": len(text.encode())}
    entry |= {"words": words, "tokens": len(ids), "window": window, "stride": stride}
    model, done = EngineLM(engine, tokenizer, on_step), 0
    per_window: list[list[float]] = []
    for given, scored in windows(ids, model.eot_token_id, window, stride):
        on_step(done, len(ids))
        per_window.append([model.log_likelihood(given, scored)[0], len(scored)])
        done += len(scored)
        if not math.isfinite(per_window[-1][0]):
            raise InputError(f"{path} has a token that the model never says", "evaluate an export without --keep-vocab")
    entry |= {"metrics": {}, "per_window": per_window}
    for metric in UNITS:
        items = _items(entry, metric)
        spread = standard_error(metric, items) if len(items) > 1 else None
        entry["metrics"][metric] = {"value": value_of(metric, items), "stderr": spread}
    return {**entry, "seconds": round(time.perf_counter() - began, 1)}


def _items(entry: dict[str, Any], metric: str) -> np.ndarray:
    """Per window the sum of log p and how many tokens, words or bytes that is of, by the whole text's means [N, 2]."""
    items = np.array(entry["per_window"], np.float64)
    items[:, 1] *= entry[UNITS[metric]] / entry["tokens"]
    return items


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Of two reports' entries for one text and stride: values, difference, its 95 % interval over resampled windows.

    There are none where text or stride are others. Where windows are of another length, or of another tokenizer's
    tokens, nothing pairs them: `low` and `high` are None, and of other tokens no figure per token is compared.
    """
    entry, other = mine.get(KEY), theirs.get(KEY)
    if not entry or not other or any(entry[key] != other[key] for key in ("text_sha256", "stride")):
        return []
    counts, theirs_counts = ([tokens for _, tokens in one["per_window"]] for one in (entry, other))
    paired = counts == theirs_counts and len(counts) > 1
    found = []
    for metric in UNITS:
        if metric == "token_perplexity" and entry["tokens"] != other["tokens"]:
            continue
        items = [_items(one, metric) for one in (entry, other)]
        value, against = (value_of(metric, part) for part in items)
        row = {"task": KEY, "metric": metric, "value": value, "other": against, "difference": value - against}
        low, high = None, None
        if paired:
            draws = resampled(metric, items[0]) - resampled(metric, items[1])
            low, high = map(float, percentile_interval(draws))
        found.append(row | {"low": low, "high": high})
    return found
