"""The clock: times a batch of probes side by side and says what each entry costs.

The exporter's own graphs run in the backend's own engine, with a fixed number of threads on fixed cores and garbage
collection off. Rounds go over all models of the batch in turn, so that drift falls on all alike. A visit takes the
lower quartile of a burst of steps, since what disturbs a step only makes it slower: warm, in a loop, as a model that
fits the caches decodes; cold, after reading twice as much as the last cache holds. An entry is the median over rounds.
Rounds go on until the bootstrap intervals of all medians are narrow or there were enough of them; entries that still
vary by more than 2.5% are measured once more and the steadier set is kept. Energy is metered afterwards, over steps of
each model in a loop.

Every round begins with a yardstick: a small model that stays in the caches, and reading the sweep. How much slower each
was than at the beginning tells what other guests and clocks do to arithmetic and to memory, and times are divided by
it: warm steps and prefills by the former, cold steps by how slow the sweep just before them was, whole models that
do not fit the caches by its root, since about half of their time is memory (docs/lab-notes.md). A round that begins
while the machine is much slower waits for better times, for a while.
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
from merino_edge.counts import MATRIX_BYTES
from merino_edge.errors import MerinoError
from merino_edge.jetson.backends import Backend
from merino_edge.jetson.energy import EnergyMeter
from merino_edge.jetson.probe import Probe
from merino_edge.measurement import WHOLE, Cache, Measurement, Mode, bootstrap_interval, spread_percent
from merino_edge.runtime.engine import Engine

WARM_UP_SECONDS = 0.012
BURST_SECONDS = 0.025
BURST_STEPS = (5, 20)
COLD_STEPS = 6
LONG_SECONDS = 0.04  # a step this long needs no company
NARROW_PERCENT = 1.0  # half a bootstrap interval, of a median that is good enough
BASELINE_VISITS = 15
SWEEPS = 5
FITTING = 8  # the part of the sweep that is sure to fit the caches
DISTURBED = 1.2  # times slower than at the beginning
PATIENCE = 5  # waits per round
WAIT_SECONDS = 0.2
METERED_SECONDS = 0.4


class Visit(NamedTuple):
    """One model in one mode. Lengths of one capacity share an engine, whose cache never shrinks again."""

    model: Architecture
    mode: Mode
    length: int
    cache: Cache
    capacity: int


class Slowness(NamedTuple):
    """How many times slower than at the beginning the machine is."""

    arithmetic: float
    memory: float


class Rounds(NamedTuple):
    """How often a batch is gone over: at least, at most, and whether unsteady entries get as many again."""

    least: int
    most: int
    again: bool


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
        self.meter = meter
        self.backend, self.precision, self.threads = backend, precision, threads
        self.sweep = np.ones(sweep_bytes // 8, np.int64)  # zeros would all lie in one page
        self.yardstick = Visit(yardstick, "decode", 1, "warm", backend.capacity(yardstick, 1))
        self.slowest = 1.0  # how many times slower than at the beginning the machine was at worst
        self._yardstick_engine: Engine | None = None
        self._baseline_ms = self._baseline_sweep_s = 1.0

    # --- a batch ---

    def measure(self, probes: Iterable[Probe], rounds: Rounds) -> list[Measurement]:
        """Every probe's entry; samples in ms, one a round. A probe whose models the backend cannot run is answered
        with the reason."""
        failures: list[Measurement] = []
        with contextlib.ExitStack() as stack:
            engines: dict[tuple[Architecture, int], Engine] = {}
            running = []
            for probe in probes:
                try:
                    for visit in self._visits(probe):
                        key = visit.model, visit.capacity
                        if key not in engines:
                            engines[key] = stack.enter_context(contextlib.closing(self._engine(visit.model)))
                        self._step(engines[key], visit)  # loads what is lazy, and shows what cannot run
                except (MerinoError, RuntimeError, MemoryError) as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    failures.append(_measurement(probe, (), reason))
                else:
                    running.append(probe)
            with no_garbage_collection():
                entries = self._series(running, engines, rounds)
                unsteady = [probe for probe, entry in zip(running, entries, strict=True) if entry.unstable]
                if rounds.again and unsteady:
                    second = {m.key: m for m in self._series(unsteady, engines, rounds)}
                    entries = [_steadier(entry, second.get(entry.key)) for entry in entries]
            if self.meter is not None:
                used = self._energies_mj(running, engines, self.meter)
                entries = [dataclasses.replace(entry, energy_mj=used[entry.key]) for entry in entries]
        return failures + entries

    def _series(
        self, probes: list[Probe], engines: Mapping[tuple[Architecture, int], Engine], rounds: Rounds
    ) -> list[Measurement]:
        samples: dict[str, list[float]] = {probe.key: [] for probe in probes}
        pending = probes
        for done in range(1, rounds.most + 1):
            slowness = self._settled()
            visits = dict.fromkeys(visit for probe in pending for visit in self._visits(probe))
            wholes = {visit for probe in pending if probe.what in WHOLE for visit in self._visits(probe)}
            times = {v: self._visit_ms(engines[v.model, v.capacity], v, slowness, v in wholes) for v in visits}
            for probe in pending:
                samples[probe.key].append(probe.cost([times[visit] for visit in self._visits(probe)]))
            if done >= rounds.least:
                pending = [probe for probe in pending if _wide(samples[probe.key])]
            if not pending:
                break
        return [_measurement(probe, tuple(samples[probe.key])) for probe in probes]

    def _visits(self, probe: Probe) -> list[Visit]:
        return [
            Visit(a, probe.mode, probe.length, probe.cache, self.backend.capacity(a, probe.length))
            for a in probe.models
        ]

    # --- a visit ---

    def _engine(self, a: Architecture) -> Engine:
        return self.backend.engine(a, self.precision, self.threads)

    def _visit_ms(self, engine: Engine, visit: Visit, slowness: Slowness, whole: bool = False) -> float:
        """The lower quartile of a burst of steps, less what slowed the machine down."""
        if visit.cache == "cold":
            steps: list[float] = []  # s
            sweeps: list[float] = []  # s
            while len(steps) < COLD_STEPS and sum(steps) < LONG_SECONDS:
                sweeps.append(self._sweep())
                steps.append(self._step(engine, visit))
            memory = float(np.quantile(sweeps, 0.25)) / self._baseline_sweep_s
            return 1000 * float(np.quantile(steps, 0.25)) / memory
        spent_ms = self._burst_ms(engine, visit)
        weight_bytes = visit.model.parameters * MATRIX_BYTES[self.precision]
        if whole and visit.mode == "decode" and weight_bytes > self.sweep.nbytes / FITTING:
            return spent_ms / math.sqrt(slowness.memory)
        return spent_ms / slowness.arithmetic

    def _burst_ms(self, engine: Engine, visit: Visit) -> float:
        """Of warm steps."""
        samples: list[float] = []  # s
        begun = time.perf_counter()
        while time.perf_counter() - begun < WARM_UP_SECONDS:
            self._step(engine, visit)
        while not self._enough(samples):
            samples.append(self._step(engine, visit))
        return 1000 * float(np.quantile(samples, 0.25))

    def _sweep(self) -> float:
        """Seconds of reading what the caches then hold instead of weights."""
        begun = time.perf_counter()
        self.sweep.sum()
        return time.perf_counter() - begun

    @staticmethod
    def _enough(samples: list[float]) -> bool:
        spent = sum(samples)
        if len(samples) >= BURST_STEPS[0]:
            return spent >= BURST_SECONDS or len(samples) >= BURST_STEPS[1]
        return spent >= LONG_SECONDS

    def _step(self, engine: Engine, visit: Visit) -> float:
        """Seconds of one step: `length` tokens into an empty cache, or one token that reads `length` places."""
        count, start = (visit.length, 0) if visit.mode == "prefill" else (1, visit.length - 1)
        tokens = np.arange(count, dtype=np.int64) % engine.vocab_size
        engine.assume(start)
        begun = time.perf_counter()
        engine.forward(tokens, start)
        return time.perf_counter() - begun

    def _energies_mj(
        self, probes: list[Probe], engines: Mapping[tuple[Architecture, int], Engine], meter: EnergyMeter
    ) -> dict[str, float | None]:
        """Every entry's energy by its key; None where no sample of the meter fell on one of its models."""
        spent: dict[Visit, float | None] = {}
        for visit in dict.fromkeys(visit for probe in probes for visit in self._visits(probe)):
            engine, steps, begun = engines[visit.model, visit.capacity], 0, time.perf_counter()
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

    # --- drift ---

    def _settled(self) -> Slowness:
        """The machine's slowness, after waiting for less where it is much."""
        slowness = self._slowness()
        for _ in range(PATIENCE):
            if max(slowness) <= DISTURBED:
                break
            time.sleep(WAIT_SECONDS)
            slowness = self._slowness()
        self.slowest = max(self.slowest, *slowness)
        return slowness

    def _slowness(self) -> Slowness:
        if self._yardstick_engine is None:
            self._yardstick_engine = self._engine(self.yardstick.model)
            times = [self._yardstick() for _ in range(BASELINE_VISITS)]
            self._baseline_ms, self._baseline_sweep_s = (statistics.median(x) for x in zip(*times, strict=True))
        burst_ms, sweep_s = self._yardstick()
        return Slowness(burst_ms / self._baseline_ms, sweep_s / self._baseline_sweep_s)

    def _yardstick(self) -> tuple[float, float]:
        assert self._yardstick_engine is not None
        sweeps = [self._sweep() for _ in range(SWEEPS)] if self.sweep.size else [1.0]
        return self._burst_ms(self._yardstick_engine, self.yardstick), float(np.quantile(sweeps, 0.25))

    def close(self) -> None:
        if self._yardstick_engine is not None:
            self._yardstick_engine.close()
            self._yardstick_engine = None


def _measurement(probe: Probe, samples: tuple[float, ...], failed: str = "") -> Measurement:
    return Measurement(probe.what, probe.mode, probe.length, probe.shape, samples, None, probe.cache, failed)


def _wide(samples: list[float]) -> bool:
    low, high = bootstrap_interval(samples)
    middle = statistics.median(samples)
    return middle <= 0 or 50 * (high - low) / middle > NARROW_PERCENT


def _steadier(first: Measurement, second: Measurement | None) -> Measurement:
    if second is None or spread_percent(first.samples) <= spread_percent(second.samples):
        return first
    return second


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
