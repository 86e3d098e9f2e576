"""Perplexity of a whole text, in sliding windows that move by `stride` tokens.

Each token is scored once. The first window scores all its tokens, after the bos or eos token. Each later window scores
the next `stride` tokens, after as many tokens before them as fill the window; each then has at least `window - stride`
before it. A stride of the window's length gives windows side by side; a smaller one takes proportionally more time. A
word is a run of characters without white space. Standard errors are over windows. Values per token compare only models
of one tokenizer, the others compare any models. The entry `perplexity` of a report
(merino_edge.runtime.evaluation.harness):

    {"file", "text_sha256", "bytes", "words", "tokens", "window", "stride", "metrics": {"token_perplexity": {"value",
     "stderr"}, "word_perplexity", "bits_per_byte"}, "per_window": [[sum of log p, tokens], ...], "seconds"}
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

from merino_edge import artefact, limits, packed_text
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.evaluation.harness import EngineLM, resampled, standard_error, value_of
from merino_edge.statistics import percentile_interval
from merino_edge.tokenizer import Tokenizer

KEY = "perplexity"
UNITS = {"token_perplexity": "tokens", "word_perplexity": "words", "bits_per_byte": "bytes"}
Pair = tuple[list[int], list[int]]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, plain or `.xz`. Raises InputError where it cannot be read or is not text."""
    try:
        return packed_text.read_text(path, limits.MAX_SCORED_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})", "give --perplexity a text file") from None
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a text, plain or .xz ({error})", "give --perplexity a text file") from None


def window_and_stride(max_positions: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """The window and the stride in tokens. The defaults are the engine's context and half a window.

    Raises InputError where one is out of its range.
    """
    window = limits.check_range("window", max_positions if window is None else window, 1, max_positions)
    return window, limits.check_range("stride", max(1, window // 2) if stride is None else stride, 1, window)


def windows(ids: Sequence[int], before: int, window: int, stride: int) -> Iterator[Pair]:
    """Split `ids`, which the token `before` precedes, into pairs (context, scored tokens) of at most `window` + 1."""
    # The harness's `context_len` counts the tokens of a window that were scored already.
    pairs = get_rolling_token_windows(list(ids), before, window, window - stride + 1)
    return map(make_disjoint_window, pairs)


def perplexity(
    path: Path,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    window: int | None = None,
    stride: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the text in `path` and return its entry of the report. `on_step` is called with (scored, all tokens).

    `before` is the entry of an interrupted run, which stays if it is of the same text and windows.

    Raises InputError where the file is not text or is empty, or the window is larger than the engine's context. It also
    raises InputError where the model gives a token probability zero.
    """
    began = time.perf_counter()
    window, stride = window_and_stride(engine.max_positions, window, stride)
    text = read_text(path)
    # Encoded in one call: the parts of a text would have other tokens at their ends.
    ids = list(tokenizer.encode_batch([text])[0].ids)
    words = len(text.split())
    if not words or not ids:
        raise InputError(f"{path} has no words", "give --perplexity a text file")
    entry: dict[str, Any] = {"file": path.name, "text_sha256": artefact.sha256_text(text), "bytes": len(text.encode())}
    entry |= {"words": words, "tokens": len(ids), "window": window, "stride": stride}
    if before is not None and all(before.get(name) == value for name, value in entry.items()):
        return before
    model, done = EngineLM(engine, tokenizer, on_step), 0
    per_window: list[list[float]] = []
    for context, scored in windows(ids, model.eot_token_id, window, stride):
        on_step(done, len(ids))
        per_window.append([model.log_likelihood(context, scored)[0], len(scored)])
        done += len(scored)
        if not math.isfinite(per_window[-1][0]):
            raise InputError(
                f"{path} has a token that the model cannot generate",
                "evaluate an export without --keep-vocab",
            )
    entry |= {"metrics": {}, "per_window": per_window}
    for metric in UNITS:
        items = _items(entry, metric)
        spread = standard_error(metric, items) if len(items) > 1 else None
        entry["metrics"][metric] = {"value": value_of(metric, items), "stderr": spread}
    return {**entry, "seconds": round(time.perf_counter() - began, 1)}


def _items(entry: dict[str, Any], metric: str) -> np.ndarray:
    """Per window the sum of log p and the number of tokens, words or bytes [N, 2].

    Words and bytes are estimated from the number of tokens, by their ratio in the whole text.
    """
    items = np.array(entry["per_window"], np.float64)
    items[:, 1] *= entry[UNITS[metric]] / entry["tokens"]
    return items


def differences(report: dict[str, Any], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the entries of two reports: a row for each metric, with its difference and 95 % interval.

    There are no rows if text or stride differ. The interval is a paired bootstrap over windows. If the windows differ,
    by their length or the tokenizer, `low` and `high` are None. Without the same number of tokens there is no row per
    token.
    """
    entry, other = report.get(KEY), baseline.get(KEY)
    if not entry or not other or any(entry[key] != other[key] for key in ("text_sha256", "stride")):
        return []
    counts, other_counts = ([tokens for _, tokens in one["per_window"]] for one in (entry, other))
    paired = counts == other_counts and len(counts) > 1
    rows = []
    for metric in UNITS:
        if metric == "token_perplexity" and entry["tokens"] != other["tokens"]:
            continue
        items = [_items(one, metric) for one in (entry, other)]
        value, other_value = (value_of(metric, part) for part in items)
        row = {"task": KEY, "metric": metric, "value": value, "other": other_value, "difference": value - other_value}
        low, high = None, None
        if paired:
            draws = resampled(metric, items[0]) - resampled(metric, items[1])
            low, high = map(float, percentile_interval(draws))
        rows.append(row | {"low": low, "high": high})
    return rows
