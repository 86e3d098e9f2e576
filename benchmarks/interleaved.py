"""Decode and prefill of several engines, turn by turn, so that what drifts in the machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np

from merino_edge.latency.measurement import spread_percent
from merino_edge.runtime.engine import Engine


def print_speeds(engines: Mapping[str, Engine], prompt_tokens: int, new_tokens: int, rounds: int, base: str) -> None:
    """Medians over rounds with their spread (1.4826 MAD), and the ratio to the engine `base` round by round."""
    names = list(engines)
    tokens = np.random.default_rng(0).integers(0, engines[base].vocab_size, prompt_tokens)
    for engine in engines.values():
        engine.forward(tokens, 0)
    times: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in ("decode", "prefill") for name in names}
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            engine = engines[name]
            begun = time.perf_counter()
            engine.forward(tokens, 0)
            between = time.perf_counter()
            for position in range(prompt_tokens, prompt_tokens + new_tokens):
                engine.forward(tokens[:1], position)
            ended = time.perf_counter()
            times["prefill", name].append(1e3 * (between - begun) / prompt_tokens)
            times["decode", name].append(1e3 * (ended - between) / new_tokens)
    for (kind, name), mine in times.items():
        ratio = statistics.median(theirs / ms for theirs, ms in zip(times[kind, base], mine, strict=True))
        spread = f"spread {spread_percent(mine):4.1f} %"
        print(f"{kind:<8} {name:<12} {statistics.median(mine):8.3f} ms a token, {spread}, {ratio:.2f} x {base}")
