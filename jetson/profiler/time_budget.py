"""The time budget: how long a plan takes here, and the finest plan that fits into a given time.

The estimate times two engines before anything is measured, the smallest and the largest of the plan. It scales in
between by parameters and tokens, and counts every batch at its most rounds. TensorRT compiles every model once before
the measurements. Models that an earlier profile compiled take no time.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
RESERVE = 0.82  # the share of the time that a plan may fill by its estimate


@dataclass(frozen=True)
class TimeEstimate:
    """The seconds that opening an engine and its steps take here, and what goes with each step."""

    open_s: float
    open_s_per_parameter: float
    step_s: float
    step_s_per_parameter: float
    prefill_s_per_token_parameter: float
    sweep_s: float  # of the processor's caches
    contention_probe_s: float
    compile_s: float = 0.0
    compile_s_per_parameter: float = 0.0
    is_compiled: Callable[[Architecture], bool] = lambda a: True

    @staticmethod
    def measure(
        backend: Backend, plan: Plan, precision: str, threads: int, *, sweep_s: float, contention_probe_s: float
    ) -> TimeEstimate:
        """Time the plan's smallest and largest model. Raises the backend's error where the smallest cannot run."""
        # Public models are far larger: a line through one of them would say little about the others.
        own = {a for probe in plan.probes if probe.what != "public" for a in probe.models}
        models = sorted(own, key=lambda a: a.parameters)
        length = min(plan.axes.lengths[0], 64)
        compiled: Any = backend.models and backend.models()
        _time(backend, models[0], precision, threads, length)  # loads libraries
        small = _time(backend, models[0], precision, threads, length)
        largest, large = models[0], small
        for a in reversed(models):
            with contextlib.suppress(MerinoError):  # one shape may be refused
                large, largest = _time(backend, a, precision, threads, length), a
                break
        more = max(1, largest.parameters - models[0].parameters)
        compile_s = [compiled.seconds(a, precision) if compiled else 0.0 for a in (models[0], largest)]
        return TimeEstimate(
            open_s=small[0],
            open_s_per_parameter=max(0.0, large[0] - small[0]) / more,
            step_s=small[1],
            step_s_per_parameter=max(0.0, large[1] - small[1]) / more,
            prefill_s_per_token_parameter=large[2] / (length * _prompt_parameters(largest)),
            sweep_s=sweep_s,
            contention_probe_s=contention_probe_s,
            compile_s=compile_s[0],
            compile_s_per_parameter=max(0.0, compile_s[1] - compile_s[0]) / more,
            is_compiled=lambda a: compiled is None or compiled.is_compiled(a, precision),
        )

    def open_seconds(self, a: Architecture) -> float:
        """Opening the engine of `a`."""
        return self.open_s + self.open_s_per_parameter * a.parameters

    def to_compile(self, batches: Iterable[ProbeBatch]) -> list[Architecture]:
        """The models of the batches that are not compiled yet, the largest first: it decides most."""
        models = {a for batch in batches for probe in batch.probes for a in probe.models}
        return sorted((a for a in models if not self.is_compiled(a)), key=lambda a: a.parameters, reverse=True)

    def compile_seconds(self, a: Architecture) -> float:
        """Compiling `a`."""
        return self.compile_s + self.compile_s_per_parameter * a.parameters

    def burst_seconds(self, probe: Probe, a: Architecture) -> float:
        """One burst of steps of `a`, one of the probe's models."""
        if probe.mode == "prefill":
            step_s = self.step_s + self.prefill_s_per_token_parameter * probe.length * _prompt_parameters(a)
            return self._warm_burst("prefill", step_s)
        step_s = self.step_s + self.step_s_per_parameter * a.parameters
        if probe.cache == "cold":
            return COLD_STEPS * (step_s + self.sweep_s + self.contention_probe_s)
        return self._warm_burst("decode", step_s)

    def seconds(self, batches: Iterable[ProbeBatch]) -> float:
        """Opening the engines of all batches, and all their rounds, without compiling."""
        return sum(map(self._batch_seconds, batches))

    def _batch_seconds(self, batch: ProbeBatch) -> float:
        opened = sum(map(self.open_seconds, {a for probe in batch.probes for a in probe.models}))
        return opened + batch.rounds.maximum * sum(
            self.burst_seconds(probe, a) for probe in batch.probes for a in probe.models
        )

    def _warm_burst(self, mode: Mode, step_s: float) -> float:
        counted = 1 if step_s >= LONG_SECONDS else min(BURST_STEPS, math.ceil(BURST_SECONDS / step_s))
        return warm_up_steps(mode, step_s) * step_s + counted * (step_s + self.contention_probe_s)


def _prompt_parameters(a: Architecture) -> int:
    """The parameters that every token of a prompt passes through: all but the embedding and the head."""
    return max(1, a.parameters - (1 if a.tied_head else 2) * a.vocab_size * a.embedding_width)


def _time(backend: Backend, a: Architecture, precision: str, threads: int, length: int) -> tuple[float, float, float]:
    """The seconds of opening an engine, of a decode step and of a prefill."""
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


def choose_plan(
    plan_of: Callable[[Detail], Plan], estimate_of: Callable[[Plan], TimeEstimate], seconds: float
) -> tuple[Plan, TimeEstimate]:
    """The finest plan whose estimate fits into `seconds`, with as many rounds as fit; else the coarsest plan."""
    estimate = estimate_of(plan_of(LADDER[-1]))

    def too_long(plan: Plan) -> bool:
        batches = make_batches(plan.probes, quick=plan.quick, max_rounds=plan.rounds)
        compiling = sum(map(estimate.compile_seconds, estimate.to_compile(batches)))
        return estimate.seconds(batches) + compiling > RESERVE * seconds

    for detail in reversed(LADDER):
        plan = plan_of(detail)
        if not too_long(plan):
            longer = [dataclasses.replace(plan, rounds=n) for n in range(plan.rounds + 2, MAX_ROUNDS + 1, 2)]
            fitting = bisect.bisect_left(longer, 1, key=too_long)
            return longer[fitting - 1] if fitting else plan, estimate
    return plan_of(LADDER[0]), estimate
