"""The clock: times a batch of probes side by side and says what each entry costs.

The exporter's own graphs run in the backend's own engine, with a fixed number of threads on fixed cores and garbage
collection off. Rounds go over all models of the batch in turn: what other guests and clocks do to a machine changes
within a quarter of a second, so a model is timed often and each time only a moment, and models that are subtracted from
each other are timed in the same moment. It also changes over minutes, for all models alike: so yardsticks, the same
small model for every kind of step, are timed along with every batch and stand in its entries. And it changes within a
millisecond where another guest's thread shares the core: that is felt beside every step and taken out of it
(`merino_edge.jetson.profiler.contention`), where one thread of a CPU runs the step. A visit takes the lower quartile of a few
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
from merino_edge.jetson.profiler.contention import Contention, loop_seconds, undisturbed
from merino_edge.jetson.profiler.probe import Probe
from merino_edge.latency.measurement import WHOLE, Cache, Measurement, Mode, doubt_percent
from merino_edge.runtime.engine import Engine

# Before a burst. A last cache that takes up only what an inner one drops fills step by step: after a sweep, decode
# steps of models of 1.5 to 4 MB took 1.9 to 2.4, 1.4, 1.2, 1.1, ... times what they took from the tenth on.
WARM_UP_STEPS, PREFILL_WARM_UP_STEPS, WARM_UP_SECONDS = 10, 2, 0.02
BURST_STEPS, BURST_SECONDS = 4, 0.006
COLD_STEPS = 2
LONG_SECONDS = 0.01  # a step this long warms itself, and needs no company
FEWEST_ROUNDS = 3  # where time runs out
NARROW_PERCENT = 1.0  # half a bootstrap interval, of a median that is good enough
LOOK_ROUNDS = 4  # between looks at whether it is
YARDSTICKS_A_ROUND = 3
YARDSTICK_TOKENS = 64  # of its prefill
METERED_SECONDS = 0.4
REFUSALS = (MerinoError, RuntimeError, MemoryError)  # of a shape that a backend cannot run


class Visit(NamedTuple):
    """One model in one mode at one length. All visits of a model share its engine."""

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


class Stopwatch:
    """Times models at one precision with one number of threads. `sweep_bytes`: read before a cold step."""

    def __init__(
        self,
        backend: Backend,
        precision: str,
        threads: int,
        sweep_bytes: int,
        yardstick: Architecture,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.yardstick, self.meter = yardstick, meter
        self.backend, self.precision, self.threads = backend, precision, threads
        self._contention: Contention | None = None  # until the thread is where it will stay
        self._swept = np.ones(sweep_bytes // 8, np.int64)  # zeros would all lie in one page

    def sweep(self) -> float:
        """Seconds of reading what the caches then hold instead of weights."""
        begun = time.perf_counter()
        self._swept.sum()
        return time.perf_counter() - begun

    def feel_seconds(self) -> float:
        """Of feeling the core before and after a step; 0 where that is not done."""
        return 2 * loop_seconds() if feels_contention(self.backend, self.threads) else 0.0

    # --- a batch ---

    def measure(self, probes: Iterable[Probe], rounds: Rounds) -> list[Measurement]:
        """Every probe's entry; samples in ms, one a round. A probe whose models the backend cannot run is answered
        with the reason."""
        failures: list[Measurement] = []
        with contextlib.ExitStack() as stack:
            engines: dict[Architecture, Engine] = {}
            running: list[Probe] = []
            last_s: dict[Visit, float] = {}  # what each visit's step took

            def open_and_step(visit: Visit) -> None:
                """Which loads what is lazy, and shows what cannot run."""
                if visit.model not in engines:
                    engine = self.backend.engine(visit.model, self.precision, self.threads)
                    engines[visit.model] = stack.enter_context(contextlib.closing(engine))
                last_s[visit] = self._step(engines[visit.model], visit)

            for probe in probes:
                try:
                    for visit in self._visits(probe):
                        open_and_step(visit)
                except REFUSALS as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    failures.append(_measurement(probe, (), reason))
                else:
                    running.append(probe)
            yardsticks = self._yardsticks(running)
            try:
                for visit in yardsticks.values():
                    open_and_step(visit)
            except REFUSALS:  # then nothing tells drift from cost
                yardsticks = {}
            if self._contention is None and feels_contention(self.backend, self.threads):
                self._contention = Contention()
            with no_garbage_collection():
                entries = self._series(running, yardsticks, engines, last_s, rounds)
            if self.meter is not None:
                used = self._energies_mj(running, engines, self.meter)
                entries = [dataclasses.replace(entry, energy_mj=used[entry.key]) for entry in entries]
        return failures + entries

    def _series(
        self,
        probes: list[Probe],
        yardsticks: Mapping[str, Visit],
        engines: Mapping[Architecture, Engine],
        last_s: dict[Visit, float],
        rounds: Rounds,
    ) -> list[Measurement]:
        samples: dict[str, list[float]] = {probe.key: [] for probe in probes}
        seen_s: dict[str, list[float]] = {kind: [] for kind in yardsticks}
        pending = probes
        for done in range(1, rounds.most + 1):
            times_s: dict[Visit, float] = {}
            visits = list(dict.fromkeys(visit for probe in pending for visit in self._visits(probe)))
            between = math.ceil(len(visits) / YARDSTICKS_A_ROUND)
            for number, visit in enumerate(visits):
                for kind, small in yardsticks.items() if number % between == 0 else ():
                    seen_s[kind].append(self._burst(engines[small.model], small, last_s[small]))
                times_s[visit] = self._burst(engines[visit.model], visit, last_s[visit])
            last_s |= times_s
            for probe in pending:
                samples[probe.key].append(probe.cost([1000 * times_s[visit] for visit in self._visits(probe)]))
            if done >= rounds.least and (done - rounds.least) % LOOK_ROUNDS == 0:
                pending = [probe for probe in pending if not doubt_percent(samples[probe.key]) <= NARROW_PERCENT]
            if not pending:
                break
        usual_ms = {kind: 1000 * statistics.median(values) for kind, values in seen_s.items()}
        return [
            dataclasses.replace(
                _measurement(probe, tuple(samples[probe.key])),
                yardsticks={kind: usual_ms[kind] for kind in self._kinds(probe) if kind in usual_ms},
            )
            for probe in probes
        ]

    def _yardsticks(self, probes: list[Probe]) -> dict[str, Visit]:
        """By kind of step: what is timed along with these probes."""
        a = self.yardstick
        steps: dict[str, tuple[Mode, int, Cache]] = {
            "decode warm": ("decode", 1, "warm"),
            "decode cold": ("decode", 1, "cold"),
            "prefill": ("prefill", min(YARDSTICK_TOKENS, a.max_positions), "warm"),
        }
        kinds = dict.fromkeys(kind for probe in probes for kind in self._kinds(probe))
        return {kind: Visit(a, *steps[kind]) for kind in kinds}

    def _kinds(self, probe: Probe) -> tuple[str, ...]:
        """Which yardsticks tell how slow the machine is for it: a whole model finds part of itself in the caches."""
        if probe.mode == "prefill":
            return ("prefill",)
        if probe.what in WHOLE and self._swept.size:
            return ("decode warm", "decode cold")
        return (f"decode {probe.cache}",)

    def _visits(self, probe: Probe) -> list[Visit]:
        return [Visit(a, probe.mode, probe.length, probe.cache) for a in probe.models]

    # --- a visit ---

    def _burst(self, engine: Engine, visit: Visit, last_s: float) -> float:
        """Seconds of a step: the lower quartile of a few."""
        steps: list[float] = []  # s
        if visit.cache == "cold":
            while len(steps) < COLD_STEPS and sum(steps) < LONG_SECONDS:
                self.sweep()
                steps.append(self._undisturbed_step(engine, visit))
        else:
            for _ in range(warm_up_steps(visit.mode, last_s)):
                self._step(engine, visit)
            while not steps or (len(steps) < BURST_STEPS and sum(steps) < BURST_SECONDS):
                steps.append(self._undisturbed_step(engine, visit))
        return float(np.quantile(steps, 0.25))

    def _undisturbed_step(self, engine: Engine, visit: Visit) -> float:
        """Seconds of one step, without what a neighbour on the core added."""
        if self._contention is None:
            return self._step(engine, visit)
        before = self._contention.slowness()
        seconds = self._step(engine, visit)
        return undisturbed(seconds, before, self._contention.slowness())

    def _step(self, engine: Engine, visit: Visit) -> float:
        """Seconds of one step: `length` tokens into an empty cache, or one token that reads `length` places."""
        count, start = (visit.length, 0) if visit.mode == "prefill" else (1, visit.length - 1)
        tokens = np.arange(count, dtype=np.int64) % engine.vocab_size
        engine.assume(start)
        begun = time.perf_counter()
        engine.forward(tokens, start)
        return time.perf_counter() - begun

    def _energies_mj(
        self, probes: list[Probe], engines: Mapping[Architecture, Engine], meter: EnergyMeter
    ) -> dict[str, float | None]:
        """Every entry's energy by its key; None where no sample of the meter fell on one of its models."""
        spent: dict[Visit, float | None] = {}
        for visit in dict.fromkeys(visit for probe in probes for visit in self._visits(probe)):
            engine, steps, begun = engines[visit.model], 0, time.perf_counter()
            with meter.measuring() as used:
                while steps == 0 or time.perf_counter() - begun < METERED_SECONDS:
                    self._step(engine, visit)
                    steps += 1
            spent[visit] = None if used.energy_mj is None else used.energy_mj / steps
        found: dict[str, float | None] = {}
        for probe in probes:
            values = [value for visit in self._visits(probe) if (value := spent[visit]) is not None]
            found[probe.key] = max(0.0, probe.cost(values)) if len(values) == len(probe.models) else None
        return found


def warm_up_steps(mode: Mode, step_s: float) -> int:
    """How many steps that take so long run before the ones that count."""
    if step_s >= LONG_SECONDS:
        return 0
    return min(WARM_UP_STEPS, math.ceil(WARM_UP_SECONDS / step_s)) if mode == "decode" else PREFILL_WARM_UP_STEPS


def feels_contention(backend: Backend, threads: int) -> bool:
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
