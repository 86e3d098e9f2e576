"""How long a plan takes here, and the finest plan that fits into a time.

The estimate times two engines before anything is measured, the smallest and the largest of the plan, and scales in
between by parameters and tokens. It counts on a batch being gone over as often as batches usually are.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from merino_edge.architecture import Architecture
from merino_edge.errors import MerinoError
from merino_edge.jetson.profiler.backends import Backend
from merino_edge.jetson.profiler.batching import ProbeBatch, make_batches
from merino_edge.jetson.profiler.plan import LADDER, MAX_ROUNDS, Detail, Plan
from merino_edge.jetson.profiler.probe import Probe
from merino_edge.jetson.profiler.timer import BURST_SECONDS, BURST_STEPS, COLD_STEPS, LONG_SECONDS, warm_up_steps
from merino_edge.latency.measurement import Mode

QUICK_MINUTES, DEFAULT_MINUTES = 2.0, 30.0
FULL_MINUTES = 8.0  # from here on 50 models are held out
RESERVE = 0.82  # of the time that a plan may fill by its estimate


@dataclass(frozen=True)
class TimeEstimate:
    """What an engine's opening, a decode step and a prefill take here [s], and beside them sweeping the caches and
    feeling the core."""

    open_s: float
    open_s_per_parameter: float
    step_s: float
    step_s_per_parameter: float
    prefill_s_per_token_parameter: float
    sweep_s: float
    contention_probe_s: float

    @staticmethod
    def measure(backend: Backend, plan: Plan, precision: str, threads: int, sweep_s: float, contention_probe_s: float) -> TimeEstimate:
        """Raises what the backend raises for its smallest model: then it runs none."""
        models = sorted({a for probe in plan.probes for a in probe.models}, key=lambda a: a.parameters)
        length = min(plan.axes.lengths[0], 64)
        _time(backend, models[0], precision, threads, length)  # loads libraries
        small = _time(backend, models[0], precision, threads, length)
        largest, large = models[0], small
        for a in reversed(models):
            with contextlib.suppress(MerinoError):  # one shape may be refused
                large, largest = _time(backend, a, precision, threads, length), a
                break
        more = max(1, largest.parameters - models[0].parameters)
        return TimeEstimate(
            small[0],
            max(0.0, large[0] - small[0]) / more,
            small[1],
            max(0.0, large[1] - small[1]) / more,
            large[2] / (length * _busy(largest)),
            sweep_s,
            contention_probe_s,
        )

    def open_seconds(self, a: Architecture) -> float:
        return self.open_s + self.open_s_per_parameter * a.parameters

    def burst_seconds(self, probe: Probe, a: Architecture) -> float:
        """One burst of steps."""
        if probe.mode == "prefill":
            step = self.step_s + self.prefill_s_per_token_parameter * probe.length * _busy(a)
            return _burst("prefill", step, self.contention_probe_s)
        step = self.step_s + self.step_s_per_parameter * a.parameters
        if probe.cache == "cold":
            return COLD_STEPS * (step + self.sweep_s + self.contention_probe_s)
        return _burst("decode", step, self.contention_probe_s)

    def seconds(self, batches: Iterable[ProbeBatch]) -> float:
        """Opening every batch's engines and going over its probes as often as is usual."""
        return sum(map(self._batch_seconds, batches))

    def _batch_seconds(self, batch: ProbeBatch) -> float:
        opened = sum(map(self.open_seconds, {a for probe in batch.probes for a in probe.models}))
        return opened + batch.rounds.most * sum(
            self.burst_seconds(probe, a) for probe in batch.probes for a in probe.models
        )


def _burst(mode: Mode, step: float, contention_probe_s: float) -> float:
    """Seconds of a repetition with such steps."""
    counted = 1 if step >= LONG_SECONDS else min(BURST_STEPS, math.ceil(BURST_SECONDS / step))
    return warm_up_steps(mode, step) * step + counted * (step + contention_probe_s)


def _busy(a: Architecture) -> int:
    """Parameters that every token of a prompt passes through."""
    return max(1, a.parameters - (1 if a.tied_head else 2) * a.vocab_size * a.embedding_width)


def _time(backend: Backend, a: Architecture, precision: str, threads: int, length: int) -> tuple[float, float, float]:
    """Seconds of opening, of a decode step, of a prefill."""
    import numpy as np

    begun = time.perf_counter()
    engine = backend.engine(a, precision, threads)
    opened = time.perf_counter() - begun
    try:
        tokens, spent = np.zeros(length, np.int64), []
        for run in (tokens[:1], tokens[:1], tokens, tokens):
            begun = time.perf_counter()
            engine.forward(run, 0)
            spent.append(time.perf_counter() - begun)
    finally:
        engine.close()
    return opened, spent[1], spent[3]


def choose(plan_of: Callable[[Detail], Plan], estimate_of: Callable[[Plan], TimeEstimate], seconds: float) -> tuple[Plan, TimeEstimate]:
    """The finest plan whose estimate fits, with as many rounds as fit, or the coarsest there is."""
    estimate = estimate_of(plan_of(LADDER[-1]))

    def fits(plan: Plan) -> bool:
        return estimate.seconds(make_batches(plan.probes, plan.quick, plan.rounds)) <= RESERVE * seconds

    for detail in reversed(LADDER):
        plan = plan_of(detail)
        if fits(plan):
            more = [dataclasses.replace(plan, rounds=n) for n in range(plan.rounds + 2, MAX_ROUNDS + 1, 2)]
            fitting = bisect.bisect_left(more, True, key=lambda longer: not fits(longer))
            return more[fitting - 1] if fitting else plan, estimate
    return plan_of(LADDER[0]), estimate
