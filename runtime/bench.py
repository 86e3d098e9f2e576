"""How fast an engine is: time to the first token, prefill and decode rates, each as every sample and its spread.

What is timed is what `generate` runs, with greedy choice: prefill of P random tokens from an empty cache, then
N steps, each one forward and one argmax. Knows no bundle and no terminal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Session

WARM_UP_STEPS = 8


@dataclass(frozen=True)
class Measurement:
    """Samples of one quantity, in the order measured."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def spread(self) -> dict[str, float | None]:
        """Smallest, largest and standard deviation (None for a single sample)."""
        deviation = statistics.stdev(self.samples) if len(self.samples) > 1 else None
        return {"min": min(self.samples), "max": max(self.samples), "sd": deviation}


@dataclass(frozen=True)
class Bench:
    first_token_ms: Measurement
    prefill_tokens_per_second: Measurement
    decode_tokens_per_second: Measurement
    peak_memory_mb: float  # 10^6 bytes, of the whole process since it started


def bench(
    engine: Engine,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    repetitions: int = 5,
    on_repetition: Callable[[], None] = lambda: None,
) -> Bench:
    """Measure, after one warm-up that is not counted. Raises InputError when the tokens exceed the context."""
    limits.check_range("prompt_tokens", prompt_tokens, 1, limits.MAX_POSITIONS)
    limits.check_range("new_tokens", new_tokens, 1, limits.MAX_POSITIONS)
    limits.check_range("repetitions", repetitions, 1, limits.MAX_REPETITIONS)
    if prompt_tokens + new_tokens > engine.max_positions:
        raise InputError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the context of {engine.max_positions}",
            "ask for fewer, or export again with a larger --context",
        )
    prompt = np.random.default_rng(0).integers(engine.vocab_size, size=prompt_tokens).tolist()
    _measure(engine, prompt, min(new_tokens, WARM_UP_STEPS))
    first_token_s, decode_s = [], []
    for _ in range(repetitions):
        first, rest = _measure(engine, prompt, new_tokens)
        first_token_s.append(first)
        decode_s.append(rest)
        on_repetition()
    return Bench(
        Measurement(tuple(seconds * 1e3 for seconds in first_token_s)),
        Measurement(tuple(prompt_tokens / seconds for seconds in first_token_s)),
        Measurement(tuple(new_tokens / seconds for seconds in decode_s)),
        peak_memory_mb(),
    )


def _measure(engine: Engine, prompt: list[int], steps: int) -> tuple[float, float]:
    """Seconds to the first token and seconds of the steps after it, from an empty cache."""
    session = Session(engine)
    began = perf_counter()
    logits = session.prefill(prompt)
    assert logits is not None  # None only when cancelled
    token = int(logits.argmax())
    first = perf_counter()
    for _ in range(steps):
        token = int(session.step(token)[0].argmax())
    return first - began, perf_counter() - first


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes.

    From Linux's VmHWM where there is one: `ru_maxrss` survives exec, so a small program started by a large
    one would report its parent's memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
