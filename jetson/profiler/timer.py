"""The timer: it times a batch of probes side by side and gives each entry's cost.

The exporter's own graphs run in the backend's engine, with a fixed number of threads on fixed cores. It corrects for
four kinds of disturbance, by how fast they change:

| disturbance | changes within | correction |
|---|---|---|
| another program on the same core | a few milliseconds | a step that it interrupts is timed again |
| a thread of another guest on the same core | a millisecond | the contention probe beside every step |
| other guests, clocks | a quarter of a second | rounds: models that are subtracted are timed in the same moment |
| the machine as a whole | minutes | the reference model, timed along with every batch |

A burst takes the lower quartile of a few steps, since a disturbance only makes a step slower. Warm steps run in a loop
until the caches are full. Cold steps run after reading twice as much as the last cache holds. An entry is the median
over rounds, which end when its confidence interval is narrow. Energy is metered afterwards, over steps in a loop.
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
from merino_edge.jetson.profiler.interruption import uninterrupted_seconds
from merino_edge.jetson.profiler.probe import Probe
from merino_edge.latency.measurement import WHOLE, Cache, Measurement, Mode, relative_half_width_percent
from merino_edge.runtime.engine import Engine

# Before a burst. A last cache that takes up only what an inner one drops fills step by step: after a sweep, decode
# steps of models of 1.5 to 4 MB took 1.9 to 2.4, 1.4, 1.2, 1.1, ... times what they took from the tenth on.
WARM_UP_STEPS, PREFILL_WARM_UP_STEPS, WARM_UP_SECONDS = 10, 2, 0.02
BURST_STEPS, BURST_SECONDS = 4, 0.006
COLD_STEPS = 2
LONG_SECONDS = 0.01  # a step this long needs no warm-up and no second step
FEWEST_ROUNDS = 3  # where time runs out
TARGET_HALF_WIDTH_PERCENT = 1.0  # of the median's confidence interval; then an entry needs no more rounds
CHECK_ROUNDS = 4  # between two looks at the confidence intervals
REFERENCE_PROBES_PER_ROUND = 3
REFERENCE_PROMPT_TOKENS = 64  # of the reference model's prefill
METERED_SECONDS = 0.4
REFUSALS = (MerinoError, RuntimeError, MemoryError)  # of a shape that a backend cannot run


class TimedStep(NamedTuple):
    """A step that is timed: one model in one mode at one length. All steps of a model share its engine."""

    model: Architecture
    mode: Mode
    length: int
    cache: Cache


class Rounds(NamedTuple):
    """How many rounds a batch gets."""

    minimum: int
    maximum: int

    def limited_to(self, share: float) -> Rounds:
        """At most this share of the maximum, but not below FEWEST_ROUNDS."""
        maximum = min(self.maximum, max(FEWEST_ROUNDS, int(share * self.maximum)))
        return Rounds(min(self.minimum, maximum), maximum)


class Timer:
    """Times models at one precision with one number of threads.

    `sweep_bytes` are read before a cold step. `reference_model` is timed along with every batch. `meter` measures
    energy; without it entries have none.
    """

    def __init__(
        self,
        backend: Backend,
        precision: str,
        threads: int,
        *,
        sweep_bytes: int,
        reference_model: Architecture,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.reference_model, self.meter = reference_model, meter
        self.backend, self.precision, self.threads = backend, precision, threads
        self._contention: ContentionProbe | None = None  # made once the thread is on its core
        self._swept = np.ones(sweep_bytes // 8, np.int64)  # zeros would all lie in one page

    def sweep(self) -> float:
        """Fill the processor's caches with other bytes than weights; the seconds that this takes."""
        begun = time.perf_counter()
        self._swept.sum()
        return time.perf_counter() - begun

    def contention_probe_seconds(self) -> float:
        """The time of the contention probes before and after a step; 0 where there are none."""
        return 2 * probe_seconds() if can_probe_contention(self.backend, self.threads) else 0.0

    # --- a batch ---

    def measure(self, probes: Iterable[Probe], rounds: Rounds) -> list[Measurement]:
        """The entry of each probe, with a sample [ms] for each round.

        An entry whose models the backend cannot run holds the reason instead.
        """
        failures: list[Measurement] = []
        with contextlib.ExitStack() as stack:
            engines: dict[Architecture, Engine] = {}
            running: list[Probe] = []
            last_s: dict[TimedStep, float] = {}  # the latest time of each step

            def open_and_run(step: TimedStep) -> None:
                """Load what is loaded lazily, and raise where the step cannot run."""
                if step.model not in engines:
                    engine = self.backend.engine(step.model, self.precision, self.threads)
                    engines[step.model] = stack.enter_context(contextlib.closing(engine))
                last_s[step] = self._run(engines[step.model], step)

            for probe in probes:
                try:
                    for step in _steps(probe):
                        open_and_run(step)
                except REFUSALS as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    failures.append(_measurement(probe, (), reason))
                else:
                    running.append(probe)
            reference_steps = self._reference_steps(running)
            try:
                for step in reference_steps.values():
                    open_and_run(step)
            except REFUSALS:  # then there is no drift correction
                reference_steps = {}
            if self._contention is None and can_probe_contention(self.backend, self.threads):
                self._contention = ContentionProbe()
            with no_garbage_collection():
                entries = self._measure_rounds(running, reference_steps, engines, last_s, rounds)
            if self.meter is not None:
                used = self._energies_mj(running, engines, self.meter)
                entries = [dataclasses.replace(entry, energy_mj=used[entry.key]) for entry in entries]
        return failures + entries

    def _measure_rounds(
        self,
        probes: list[Probe],
        reference_steps: Mapping[str, TimedStep],
        engines: Mapping[Architecture, Engine],
        last_s: dict[TimedStep, float],
        rounds: Rounds,
    ) -> list[Measurement]:
        samples: dict[str, list[float]] = {probe.key: [] for probe in probes}
        reference_s: dict[str, list[float]] = {kind: [] for kind in reference_steps}
        pending = probes
        for done in range(1, rounds.maximum + 1):
            times_s: dict[TimedStep, float] = {}
            steps = list(dict.fromkeys(step for probe in pending for step in _steps(probe)))
            between = math.ceil(len(steps) / REFERENCE_PROBES_PER_ROUND)
            for number, step in enumerate(steps):
                for kind, reference in reference_steps.items() if number % between == 0 else ():
                    reference_s[kind].append(self._burst(engines[reference.model], reference, last_s[reference]))
                times_s[step] = self._burst(engines[step.model], step, last_s[step])
            last_s |= times_s
            for probe in pending:
                samples[probe.key].append(probe.cost([1000 * times_s[step] for step in _steps(probe)]))
            if done >= rounds.minimum and (done - rounds.minimum) % CHECK_ROUNDS == 0:
                pending = [probe for probe in pending if not _precise(samples[probe.key])]
            if not pending:
                break
        reference_ms = {kind: 1000 * statistics.median(values) for kind, values in reference_s.items()}
        return [
            dataclasses.replace(
                _measurement(probe, tuple(samples[probe.key])),
                reference_ms={kind: reference_ms[kind] for kind in self._kinds(probe) if kind in reference_ms},
            )
            for probe in probes
        ]

    def _reference_steps(self, probes: list[Probe]) -> dict[str, TimedStep]:
        """The reference model's steps that are timed along with these probes, by kind."""
        a = self.reference_model
        steps: dict[str, tuple[Mode, int, Cache]] = {
            "decode warm": ("decode", 1, "warm"),
            "decode cold": ("decode", 1, "cold"),
            "prefill": ("prefill", min(REFERENCE_PROMPT_TOKENS, a.max_positions), "warm"),
        }
        kinds = dict.fromkeys(kind for probe in probes for kind in self._kinds(probe))
        return {kind: TimedStep(a, *steps[kind]) for kind in kinds}

    def _kinds(self, probe: Probe) -> tuple[str, ...]:
        """The kinds of reference step that tell the machine's slowness for this probe.

        A whole model finds a part of its weights in the caches, so warm and cold steps both count.
        """
        if probe.mode == "prefill":
            return ("prefill",)
        if probe.what in WHOLE and self._swept.size:
            return ("decode warm", "decode cold")
        return (f"decode {probe.cache}",)

    # --- a step ---

    def _burst(self, engine: Engine, step: TimedStep, last_s: float) -> float:
        """The lower quartile [s] of a few steps."""
        seconds: list[float] = []
        if step.cache == "cold":
            while len(seconds) < COLD_STEPS and sum(seconds) < LONG_SECONDS:
                self.sweep()
                seconds.append(self._corrected_run(engine, step))
        else:
            for _ in range(warm_up_steps(step.mode, last_s)):
                self._run(engine, step)
            while not seconds or (len(seconds) < BURST_STEPS and sum(seconds) < BURST_SECONDS):
                seconds.append(self._corrected_run(engine, step))
        return float(np.quantile(seconds, 0.25))

    def _corrected_run(self, engine: Engine, step: TimedStep) -> float:
        """The seconds of one step that no other program interrupted, corrected for contention on its core."""
        if self.backend.device != "cpu":
            return self._run(engine, step)

        def run() -> float:
            if self._contention is None:
                return self._run(engine, step)
            before = self._contention.slowness()
            seconds = self._run(engine, step)
            return without_contention(seconds, before, self._contention.slowness())

        again = self.sweep if step.cache == "cold" else lambda: self._run(engine, step)
        return uninterrupted_seconds(run, again, one_thread=self.threads == 1)

    def _run(self, engine: Engine, step: TimedStep) -> float:
        """The seconds of a prefill of `length` tokens, or of one token that reads `length` cache positions."""
        count, start = (step.length, 0) if step.mode == "prefill" else (1, step.length - 1)
        tokens = np.arange(count, dtype=np.int64) % engine.vocab_size
        engine.mark_filled(start)
        begun = time.perf_counter()
        engine.forward(tokens, start)
        return time.perf_counter() - begun

    def _energies_mj(
        self, probes: list[Probe], engines: Mapping[Architecture, Engine], meter: EnergyMeter
    ) -> dict[str, float | None]:
        """Each entry's energy by its key; None where the meter has no sample during one of its models."""
        spent: dict[TimedStep, float | None] = {}
        for step in dict.fromkeys(step for probe in probes for step in _steps(probe)):
            engine, count, begun = engines[step.model], 0, time.perf_counter()
            with meter.measuring() as used:
                while count == 0 or time.perf_counter() - begun < METERED_SECONDS:
                    self._run(engine, step)
                    count += 1
            spent[step] = None if used.energy_mj is None else used.energy_mj / count
        energies: dict[str, float | None] = {}
        for probe in probes:
            values = [value for step in _steps(probe) if (value := spent[step]) is not None]
            energies[probe.key] = max(0.0, probe.cost(values)) if len(values) == len(probe.models) else None
        return energies


def warm_up_steps(mode: Mode, step_s: float) -> int:
    """How many steps of this duration run before a burst."""
    if step_s >= LONG_SECONDS:
        return 0
    return min(WARM_UP_STEPS, math.ceil(WARM_UP_SECONDS / step_s)) if mode == "decode" else PREFILL_WARM_UP_STEPS


def can_probe_contention(backend: Backend, threads: int) -> bool:
    """Whether steps run on this thread's core alone, so that the contention probe meets what they meet."""
    return backend.device == "cpu" and threads == 1


def _precise(samples: list[float]) -> bool:
    return relative_half_width_percent(samples) <= TARGET_HALF_WIDTH_PERCENT


def _steps(probe: Probe) -> list[TimedStep]:
    return [TimedStep(a, probe.mode, probe.length, probe.cache) for a in probe.models]


def _measurement(probe: Probe, samples: tuple[float, ...], failed: str = "") -> Measurement:
    return Measurement(probe.what, probe.mode, probe.length, probe.shape, samples, cache=probe.cache, failed=failed)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Pin the process, and the threads it starts, to as many cores as it has threads."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off, and afterwards on again if it was on."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
