"""How fast engines are: prompts and steps at chosen depths of the cache, each as every sample.

Cases are llama-bench's: `pp64` is a prompt of 64 tokens up to the choice of the first new one, `tg128` 128 steps, each
one forward and one choice, and `@d512` has 512 positions in the cache before. What is timed is what `generate` runs,
greedy and without guesses. Cases, and engines where there are several, take turns within every repetition, so that what
drifts in the machine drifts for all of them. Knows no bundle and no terminal.
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
from merino_edge.runtime.engine import Engine, TopKEngine, TokenIds

WARM_UP_STEPS = 8
PERCENTILES = (50, 95, 99)
EXACT_SIGNS = 16  # rounds up to which all signs of a permutation test are gone through


@dataclass(frozen=True)
class Case:
    """`tokens` of a prompt, or steps, behind `depth` positions."""

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{'pp' if self.kind == 'prefill' else 'tg'}{self.tokens}" + (f"@d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Result:
    """`step_ms`: of a prompt one value a repetition, the time to the first token; of steps every one."""

    case: Case
    tokens_per_second: tuple[float, ...]  # one a repetition
    step_ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    def to_dict(self) -> dict[str, Any]:
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
    """Every prompt and every run of steps at every depth. Raises InputError for counts out of their limits."""
    for name, values, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 1),
        ("depth", depths, 0),
    ):
        for value in values:
            limits.check_range(name, value, least, limits.MAX_POSITIONS)
    if not (prompt_tokens or new_tokens):
        raise InputError("there is nothing to measure", "give --prompt-tokens or --new-tokens")
    prompts = [Case("prefill", tokens, depth) for depth in depths for tokens in prompt_tokens]
    steps = [Case("decode", tokens, depth) for depth in depths for tokens in new_tokens]
    return list(dict.fromkeys(prompts + steps))


def bench(
    engines: Mapping[str, Engine],
    wanted: Sequence[Case],
    repetitions: int = 5,
    on_case: Callable[[], None] = lambda: None,
) -> dict[str, list[Result]]:
    """Every case of every engine, by its name, after one warm-up that is not counted. Raises InputError where a case
    exceeds a context."""
    limits.check_range("repetitions", repetitions, 1, limits.MAX_REPETITIONS)
    for engine, case in itertools.product(engines.values(), wanted):
        if case.depth + case.tokens > engine.max_positions:
            raise InputError(
                f"{case.tokens} tokens behind {case.depth} exceed the context of {engine.max_positions}",
                "ask for fewer, or export again with a larger --context",
            )
    for engine, case in itertools.product(engines.values(), wanted):
        run_once(engine, Case(case.kind, min(case.tokens, WARM_UP_STEPS) if case.kind == "decode" else case.tokens))
    found: dict[tuple[str, Case], list[list[float]]] = {key: [] for key in itertools.product(engines, wanted)}
    for number in range(repetitions):
        for case in wanted:
            for name in list(engines)[:: -1 if number % 2 else 1]:
                found[name, case].append(run_once(engines[name], case))
                on_case()
    return {name: [_result(case, found[name, case]) for case in wanted] for name in engines}


def run_once(engine: Engine, case: Case) -> list[float]:
    """Seconds of the prompt, or of each step."""
    prompt = np.random.default_rng(0).integers(engine.vocab_size, size=case.tokens)
    engine.mark_filled(case.depth)
    if case.kind == "prefill":
        began = perf_counter()
        engine.forward(prompt, case.depth).argmax()
        return [perf_counter() - began]
    token, times = prompt[:1], []
    likeliest_after = _likeliest_after(engine)
    for position in range(case.depth, case.depth + case.tokens):
        began = perf_counter()
        token = np.asarray([likeliest_after(token, position)])
        times.append(perf_counter() - began)
    return times


def _likeliest_after(engine: Engine) -> Callable[[TokenIds, int], int]:
    """Runs tokens at a position and says which comes next, with as much of the logits as `generate` asks for."""
    if not isinstance(engine, TopKEngine):
        return lambda tokens, start: int(engine.forward(tokens, start).argmax())

    def selected(tokens: TokenIds, start: int) -> int:
        logits, ids = engine.forward_topk(tokens, start, 1)
        best = int(logits.argmax())
        return best if ids is None else int(ids[best])

    return selected


def _result(case: Case, times_s: list[list[float]]) -> Result:
    rates = tuple(case.tokens / sum(times) for times in times_s)
    return Result(case, rates, tuple(1e3 * s for times in times_s for s in times))


@dataclass(frozen=True)
class Comparison:
    """How many times as fast the first is as the second, repetition by repetition; `p_value` of their being alike."""

    ratio: float  # median
    low: float
    high: float
    p_value: float


def compare(first: Result, second: Result) -> Comparison:
    """Of the same case, measured in turns: an exact test of the signs of the ratios' logarithms, two-sided."""
    pairs = zip(first.tokens_per_second, second.tokens_per_second, strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    logs = np.log(ratios)
    if len(logs) <= EXACT_SIGNS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(logs))))
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(2**EXACT_SIGNS, len(logs)))
    sums = np.abs(signs @ logs)
    reached = float((sums >= abs(logs.sum()) * (1 - 1e-12)).mean())
    return Comparison(statistics.median(ratios), min(ratios), max(ratios), reached)
