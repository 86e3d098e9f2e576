"""Benchmarks engines: times prefill and decode at given depths of the cache, and keeps all samples.

Cases are named as in llama-bench. `pp64` is the prefill of 64 tokens up to the first new token. `tg128` is 128 decode
steps. `@d512` means that 512 positions of the cache are filled before. The timed work is that of `generate` with
greedy sampling and without draft tokens. Cases and engines take turns within each repetition, so a drift of the
machine affects all of them alike. Knows no bundle and no terminal.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine, TokenIds, TopKEngine

WARM_UP_STEPS = 8
PERCENTILES = (50, 95, 99)
EXACT_SIGNS = 16  # up to so many repetitions the sign test enumerates all signs; beyond that it samples them


@dataclass(frozen=True)
class Case:
    """A prefill of `tokens` tokens or `tokens` decode steps, after `depth` filled positions."""

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it, such as pp512 or tg128@d512."""
        return f"{'pp' if self.kind == 'prefill' else 'tg'}{self.tokens}" + (f"@d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Result:
    """The samples of one case on one engine."""

    case: Case
    tokens_per_second: tuple[float, ...]  # one value per repetition
    step_ms: tuple[float, ...]  # prefill: the time to the first token, one per repetition; decode: all steps

    @property
    def median(self) -> float:
        """Median of tokens per second over repetitions."""
        return statistics.median(self.tokens_per_second)

    def to_dict(self) -> dict[str, Any]:
        """As `bench --json` prints it: the case, mean and spread, percentiles of step times, and all samples."""
        rates = self.tokens_per_second
        percentiles = np.percentile(self.step_ms, PERCENTILES)
        return {
            "test": self.case.name,
            "kind": self.case.kind,
            "tokens": self.case.tokens,
            "depth": self.case.depth,
            "tokens_per_second": self.median,
            "mean": statistics.fmean(rates),
            "sd": statistics.stdev(rates) if len(rates) > 1 else None,
            "min": min(rates),
            "max": max(rates),
            **{f"p{p}_ms": float(ms) for p, ms in zip(PERCENTILES, percentiles, strict=True)},
            "samples": list(rates),
        }


def cases(prompt_tokens: Sequence[int], new_tokens: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """All combinations of prompt lengths or numbers of steps with depths, without duplicates.

    Raises InputError for counts out of their limits.
    """
    for name, values, lowest in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 1),
        ("depth", depths, 0),
    ):
        for value in values:
            limits.check_range(name, value, lowest, limits.MAX_POSITIONS)
    if not (prompt_tokens or new_tokens):
        raise InputError("there is nothing to measure", "give --prompt-tokens or --new-tokens")
    prompts = [Case("prefill", tokens, depth) for depth in depths for tokens in prompt_tokens]
    steps = [Case("decode", tokens, depth) for depth in depths for tokens in new_tokens]
    return list(dict.fromkeys(prompts + steps))


def bench(
    engines: Mapping[str, Engine],
    requested: Sequence[Case],
    repetitions: int = 5,
    on_case: Callable[[], None] = lambda: None,
) -> dict[str, list[Result]]:
    """Run all cases on all engines and return the results by the engine's name, in the order of `requested`.

    A warm-up runs first and is not counted. `on_case` is called after each timed case. Raises InputError where a case
    exceeds an engine's context or `repetitions` its limits.
    """
    limits.check_range("repetitions", repetitions, 1, limits.MAX_REPETITIONS)
    for engine, case in itertools.product(engines.values(), requested):
        if case.depth + case.tokens > engine.max_positions:
            raise InputError(
                f"{case.tokens} tokens behind {case.depth} exceed the context of {engine.max_positions}",
                "ask for fewer, or export again with a larger --context",
            )
    for engine, case in itertools.product(engines.values(), requested):
        run_once(engine, Case(case.kind, min(case.tokens, WARM_UP_STEPS) if case.kind == "decode" else case.tokens))
    times_s: dict[tuple[str, Case], list[list[float]]] = {key: [] for key in itertools.product(engines, requested)}
    for number in range(repetitions):
        for case in requested:
            for name in list(engines)[:: -1 if number % 2 else 1]:
                times_s[name, case].append(run_once(engines[name], case))
                on_case()
    return {name: [_result(case, times_s[name, case]) for case in requested] for name in engines}


def run_once(engine: Engine, case: Case) -> list[float]:
    """Run one case and return seconds: one value for a prefill, one per step for decode."""
    prompt = np.random.default_rng(0).integers(engine.vocab_size, size=case.tokens)
    engine.mark_filled(case.depth)
    if case.kind == "prefill":
        began = perf_counter()
        engine.forward(prompt, case.depth).argmax()
        return [perf_counter() - began]
    token, times_s = prompt[:1], []
    next_token = _greedy_step(engine)
    for position in range(case.depth, case.depth + case.tokens):
        began = perf_counter()
        token = np.asarray([next_token(token, position)])
        times_s.append(perf_counter() - began)
    return times_s


def _greedy_step(engine: Engine) -> Callable[[TokenIds, int], int]:
    """A function that runs tokens at a position and returns the most likely next one, as `generate` does it."""
    if not isinstance(engine, TopKEngine):
        return lambda tokens, start: int(engine.forward(tokens, start).argmax())

    def with_topk(tokens: TokenIds, start: int) -> int:
        logits, ids = engine.forward_topk(tokens, start, 1)
        best = int(logits.argmax())
        return best if ids is None else int(ids[best])

    return with_topk


def _result(case: Case, times_s: list[list[float]]) -> Result:
    rates = tuple(case.tokens / sum(times) for times in times_s)
    return Result(case, rates, tuple(1e3 * s for times in times_s for s in times))


@dataclass(frozen=True)
class Comparison:
    """The ratio of two engines' speeds, first over second, paired by repetition."""

    ratio: float  # median
    low: float  # smallest
    high: float  # largest
    p_value: float  # probability of a ratio so far from 1 if both were equally fast


def compare(first: Result, second: Result) -> Comparison:
    """Compare two results of the same case that were measured in turns.

    The p-value is that of a two-sided permutation test of the signs of log(ratio): exact up to EXACT_SIGNS
    repetitions, sampled beyond.
    """
    pairs = zip(first.tokens_per_second, second.tokens_per_second, strict=True)
    ratios = [a / b for a, b in pairs]
    logs = np.log(ratios)
    if len(logs) <= EXACT_SIGNS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(logs))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(2**EXACT_SIGNS, len(logs)))
    sums, rounding = np.abs(signs @ logs), 1e-12 * np.abs(logs).sum()
    p_value = float((sums >= abs(logs.sum()) - rounding).mean())
    return Comparison(statistics.median(ratios), min(ratios), max(ratios), p_value)
