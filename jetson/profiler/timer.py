"""The clock: times a batch of probes side by side and says what each entry costs.

The exporter's own graphs run in the backend's own engine, with a fixed number of threads on fixed cores and garbage
collection off. Rounds go over all models of the batch in turn: what other guests and clocks do to a machine changes
within a quarter of a second, so a model is timed often and each time only a moment, and models that are subtracted from
each other are timed in the same moment. It also changes over minutes, for all models alike: so reference_ms, the same
small model for every kind of step, are timed along with every batch and stand in its entries. And it changes within a
millisecond where another guest's thread shares the core: that is felt beside every step and taken out of it
(`merino_edge.jetson.profiler.contention`), where one thread of a CPU runs the step. A timed_step takes the lower quartile of a few
steps, since what disturbs a step only makes it slower: warm, in a loop that has run until the caches hold what they
will, as a model that fits them decodes; cold, after reading twice as much as the last cache holds. An entry is the
median over rounds. Rounds go on until the bootstrap interval of the median is narrow or there were enough of them;
entries whose interval then still exceeds 2.5% are flagged. Energy is metered afterwards, over steps of each model in a
loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.errors import MerinoError
from merino_edge.jetson.device.energy import EnergyMeter
from merino_edge.jetson.profiler.backends import Backend
from merino_edge.jetson.profiler.contention import ContentionProbe, probe_seconds, without_contention
from merino_edge.jetson.profiler.probe import Probe
from merino_edge.latency.measurement import WHOLE, Cache, Measurement, Mode, relative_half_width_percent
from merino_edge.runtime.engine import Engine

# Before a burst. A last cache that takes up only what an inner one drops fills step by step: after a sweep, decode
# steps of models of 1.5 to 4 MB took 1.9 to 2.4, 1.4, 1.2, 1.1, ... times what they took from the tenth on.
WARM_UP_STEPS, PREFILL_WARM_UP_STEPS, WARM_UP_SECONDS = 10, 2, 0.02
BURST_STEPS, BURST_SECONDS = 4, 0.006
COLD_STEPS = 2
LONG_SECONDS = 0.01  # a step this long warms itself, and needs no eviction_head_vocab_size
FEWEST_ROUNDS = 3  # where time runs out
TARGET_HALF_WIDTH_PERCENT = 1.0  # half a bootstrap interval, of a median that is good enough
LOOK_ROUNDS = 4  # between looks at whether it is
REFERENCE_PROBES_PER_ROUND = 3
REFERENCE_PROMPT_TOKENS = 64  # of its prefill
METERED_SECONDS = 0.4
REFUSALS = (MerinoError, RuntimeError, MemoryError)  # of a shape that a backend cannot run


class TimedStep(NamedTuple):
    """One model in one mode at one length. All timed_steps of a model share its engine."""

    model: Architecture
    mode: Mode
    length: int
    cache: Cache


class Rounds(NamedTuple):
    """How often a batch is gone over: at least, at most."""

    least: int
    most: int

    def fewer(self, share: float) -> Rounds:
        """That share of the most, where it is not above one, and not below FEWEST_ROUNDS."""
        most = min(self.most, max(FEWEST_ROUNDS, int(share * self.most)))
        return Rounds(min(self.least, most), most)


class Timer:
    """Times models at one precision with one number of threads. `sweep_bytes`: read before a cold step."""

    def __init__(
        self,
        backend: Backend,
        precision: str,
        threads: int,
        sweep_bytes: int,
        reference_model: Architecture,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.reference_model, self.meter = reference_model, meter
        self.backend, self.precision, self.threads = backend, precision, threads
        self._contention: ContentionProbe | None = None  # until the thread is where it will stay
        self._swept = np.ones(sweep_bytes // 8, np.int64)  # zeros would all lie in one page

    def sweep(self) -> float:
        """Seconds of reading what the caches then hold instead of weights."""
        begun = time.perf_counter()
        self._swept.sum()
        return time.perf_counter() - begun

    def contention_probe_seconds(self) -> float:
        """Of feeling the core before and after a step; 0 where that is not done."""
        return 2 * probe_seconds() if can_probe_contention(self.backend, self.threads) else 0.0

    # --- a batch ---

    def measure(self, probes: Iterable[Probe], rounds: Rounds) -> list[Measurement]:
        """Every probe's entry; samples in ms, one a round. A probe whose models the backend cannot run is answered
        with the reason."""
        failures: list[Measurement] = []
        with contextlib.ExitStack() as stack:
            engines: dict[Architecture, Engine] = {}
            running: list[Probe] = []
            last_s: dict[TimedStep, float] = {}  # what each timed_step's step took

            def open_and_step(timed_step: TimedStep) -> None:
                """Which loads what is lazy, and shows what cannot run."""
                if timed_step.model not in engines:
                    engine = self.backend.engine(timed_step.model, self.precision, self.threads)
                    engines[timed_step.model] = stack.enter_context(contextlib.closing(engine))
                last_s[timed_step] = self._step(engines[timed_step.model], timed_step)

            for probe in probes:
                try:
                    for timed_step in self._timed_steps(probe):
                        open_and_step(timed_step)
                except REFUSALS as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    failures.append(_measurement(probe, (), reason))
                else:
                    running.append(probe)
            reference_ms = self._reference_steps(running)
            try:
                for timed_step in reference_ms.values():
                    open_and_step(timed_step)
            except REFUSALS:  # then nothing tells drift from cost
                reference_ms = {}
            if self._contention is None and can_probe_contention(self.backend, self.threads):
                self._contention = ContentionProbe()
            with no_garbage_collection():
                entries = self._series(running, reference_ms, engines, last_s, rounds)
            if self.meter is not None:
                used = self._energies_mj(running, engines, self.meter)
                entries = [dataclasses.replace(entry, energy_mj=used[entry.key]) for entry in entries]
        return failures + entries

    def _series(
        self,
        probes: list[Probe],
        reference_ms: Mapping[str, TimedStep],
        engines: Mapping[Architecture, Engine],
        last_s: dict[TimedStep, float],
        rounds: Rounds,
    ) -> list[Measurement]:
        samples: dict[str, list[float]] = {probe.key: [] for probe in probes}
        seen_s: dict[str, list[float]] = {kind: [] for kind in reference_ms}
        pending = probes
        for done in range(1, rounds.most + 1):
            times_s: dict[TimedStep, float] = {}
            timed_steps = list(dict.fromkeys(timed_step for probe in pending for timed_step in self._timed_steps(probe)))
            between = math.ceil(len(timed_steps) / REFERENCE_PROBES_PER_ROUND)
            for number, timed_step in enumerate(timed_steps):
                for kind, small in reference_ms.items() if number % between == 0 else ():
                    seen_s[kind].append(self._burst(engines[small.model], small, last_s[small]))
                times_s[timed_step] = self._burst(engines[timed_step.model], timed_step, last_s[timed_step])
            last_s |= times_s
            for probe in pending:
                samples[probe.key].append(probe.cost([1000 * times_s[timed_step] for timed_step in self._timed_steps(probe)]))
            if done >= rounds.least and (done - rounds.least) % LOOK_ROUNDS == 0:
                pending = [probe for probe in pending if not relative_half_width_percent(samples[probe.key]) <= TARGET_HALF_WIDTH_PERCENT]
            if not pending:
                break
        usual_ms = {kind: 1000 * statistics.median(values) for kind, values in seen_s.items()}
        return [
            dataclasses.replace(
                _measurement(probe, tuple(samples[probe.key])),
                reference_ms={kind: usual_ms[kind] for kind in self._kinds(probe) if kind in usual_ms},
            )
            for probe in probes
        ]

    def _reference_steps(self, probes: list[Probe]) -> dict[str, TimedStep]:
        """By kind of step: what is timed along with these probes."""
        a = self.reference_model
        steps: dict[str, tuple[Mode, int, Cache]] = {
            "decode warm": ("decode", 1, "warm"),
            "decode cold": ("decode", 1, "cold"),
            "prefill": ("prefill", min(REFERENCE_PROMPT_TOKENS, a.max_positions), "warm"),
        }
        kinds = dict.fromkeys(kind for probe in probes for kind in self._kinds(probe))
        return {kind: TimedStep(a, *steps[kind]) for kind in kinds}

    def _kinds(self, probe: Probe) -> tuple[str, ...]:
        """Which reference_ms tell how slow the machine is for it: a whole model finds part of itself in the caches."""
        if probe.mode == "prefill":
            return ("prefill",)
        if probe.what in WHOLE and self._swept.size:
            return ("decode warm", "decode cold")
        return (f"decode {probe.cache}",)

    def _timed_steps(self, probe: Probe) -> list[TimedStep]:
        return [TimedStep(a, probe.mode, probe.length, probe.cache) for a in probe.models]

    # --- a timed_step ---

    def _burst(self, engine: Engine, timed_step: TimedStep, last_s: float) -> float:
        """Seconds of a step: the lower quartile of a few."""
        steps: list[float] = []  # s
        if timed_step.cache == "cold":
            while len(steps) < COLD_STEPS and sum(steps) < LONG_SECONDS:
                self.sweep()
                steps.append(self._undisturbed_step(engine, timed_step))
        else:
            for _ in range(warm_up_steps(timed_step.mode, last_s)):
                self._step(engine, timed_step)
            while not steps or (len(steps) < BURST_STEPS and sum(steps) < BURST_SECONDS):
                steps.append(self._undisturbed_step(engine, timed_step))
        return float(np.quantile(steps, 0.25))

    def _undisturbed_step(self, engine: Engine, timed_step: TimedStep) -> float:
        """Seconds of one step, without what a neighbour on the core added."""
        if self._contention is None:
            return self._step(engine, timed_step)
        before = self._contention.slowness()
        seconds = self._step(engine, timed_step)
        return without_contention(seconds, before, self._contention.slowness())

    def _step(self, engine: Engine, timed_step: TimedStep) -> float:
        """Seconds of one step: `length` tokens into an empty cache, or one token that reads `length` cache_capacity."""
        count, start = (timed_step.length, 0) if timed_step.mode == "prefill" else (1, timed_step.length - 1)
        tokens = np.arange(count, dtype=np.int64) % engine.vocab_size
        engine.mark_filled(start)
        begun = time.perf_counter()
        engine.forward(tokens, start)
        return time.perf_counter() - begun

    def _energies_mj(
        self, probes: list[Probe], engines: Mapping[Architecture, Engine], meter: EnergyMeter
    ) -> dict[str, float | None]:
        """Every entry's energy by its key; None where no sample of the meter fell on one of its models."""
        spent: dict[TimedStep, float | None] = {}
        for timed_step in dict.fromkeys(timed_step for probe in probes for timed_step in self._timed_steps(probe)):
            engine, steps, begun = engines[timed_step.model], 0, time.perf_counter()
            with meter.measuring() as used:
                while steps == 0 or time.perf_counter() - begun < METERED_SECONDS:
                    self._step(engine, timed_step)
                    steps += 1
            spent[timed_step] = None if used.energy_mj is None else used.energy_mj / steps
        found: dict[str, float | None] = {}
        for probe in probes:
            values = [value for timed_step in self._timed_steps(probe) if (value := spent[timed_step]) is not None]
            found[probe.key] = max(0.0, probe.cost(values)) if len(values) == len(probe.models) else None
        return found


def warm_up_steps(mode: Mode, step_s: float) -> int:
    """How many steps that take so long run before the ones that count."""
    if step_s >= LONG_SECONDS:
        return 0
    return min(WARM_UP_STEPS, math.ceil(WARM_UP_SECONDS / step_s)) if mode == "decode" else PREFILL_WARM_UP_STEPS


def can_probe_contention(backend: Backend, threads: int) -> bool:
    """Whether a step runs on this thread's core alone, so that a loop there meets what the step meets."""
    return backend.device == "cpu" and threads == 1


def _measurement(probe: Probe, samples: tuple[float, ...], failed: str = "") -> Measurement:
    return Measurement(probe.what, probe.mode, probe.length, probe.shape, samples, None, probe.cache, failed)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """The process, and threads it starts, on as many cores as it has threads."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
