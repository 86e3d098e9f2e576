"""Energy of a piece of work: power rails sampled while it runs, or RAPL counters read before and after.

    meter = EnergyMeter.of()
    if meter:
        with meter.measuring() as used:
            work()
        used.energy_mj

Sampled power is integrated over the work's time by trapezoids. There are 20 samples a second, so short work may get
none. The whole module is measured, with everything else that runs on it. Sampling takes a little processor time, so
measure latency separately.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from merino_edge.jetson.device import tegrastats
from merino_edge.jetson.device.rails import total_mw
from merino_edge.jetson.device.sensors import Sensors

SAMPLE_SECONDS = 0.05

Sample = tuple[float, float]  # (time [s], power [mW])


@dataclass
class EnergyUse:
    """Filled in when the work ends. `energy_mj` is None where no sample fell into it or a counter vanished."""

    energy_mj: float | None = None
    seconds: float = 0.0
    samples: int = 0


class EnergyMeter:
    """Measures the energy of a block of code by this machine's sensors."""

    def __init__(self, sensors: Sensors) -> None:
        self.sensors = sensors

    @classmethod
    def of(cls, root: Path | str = "/") -> EnergyMeter | None:
        """The meter of this machine; None where no power can be read (`Sensors.power_source` says why)."""
        sensors = Sensors(root)
        return cls(sensors) if sensors.source else None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[EnergyUse]:
        """Measure the block; its energy stands in the yielded object afterwards."""
        used = EnergyUse()
        if self.sensors.source == "rapl":
            before_uj, begin = self.sensors.rapl.counters_uj(), time.perf_counter()
            yield used
            used.seconds = time.perf_counter() - begin
            used.energy_mj = self.sensors.rapl.used_mj(before_uj, self.sensors.rapl.counters_uj())
            used.samples = 2 if used.energy_mj is not None else 0
            return
        samples: list[Sample] = []
        with self._sampling(samples):
            begin = time.perf_counter()
            yield used
            end = time.perf_counter()
        used.seconds = end - begin
        used.samples = sum(begin <= at <= end for at, _ in samples)
        used.energy_mj = integral_mj(samples, begin, end)

    @contextlib.contextmanager
    def _sampling(self, samples: list[Sample]) -> Iterator[None]:
        """Run a thread that adds to `samples` until the block ends, also by an exception."""
        stop = threading.Event()
        with contextlib.ExitStack() as stack:
            if self.sensors.source == "tegrastats":
                thread = threading.Thread(target=_sample_lines, args=(self._tegrastats(stack), samples, stop))
            else:
                thread = threading.Thread(target=_sample_rails, args=(self.sensors, samples, stop))
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _tegrastats(self, stack: contextlib.ExitStack) -> tegrastats.Process | None:
        """The program after its first line; None where it no longer runs."""
        try:
            process = stack.enter_context(tegrastats.Process(self.sensors.tegrastats, int(1000 * SAMPLE_SECONDS)))
            return process if process.next_line(tegrastats.FIRST_LINE_SECONDS) is not None else None
        except (OSError, EOFError):
            return None


def integral_mj(samples: Sequence[Sample], begin: float, end: float) -> float | None:
    """The energy [mJ] from `begin` to `end` [s] by trapezoids; None where no sample lies between.

    The power of the outer samples holds up to the ends.
    """
    inside = [(at, power_mw) for at, power_mw in samples if begin <= at <= end]
    if not inside:
        return None
    points = [(begin, inside[0][1]), *inside, (end, inside[-1][1])]
    return sum((later - at) * (power + power_later) / 2 for (at, power), (later, power_later) in pairwise(points))


def _sample_rails(sensors: Sensors, samples: list[Sample], stop: threading.Event) -> None:
    pause = SAMPLE_SECONDS / 2  # a sample stands for the time around it
    while not stop.wait(pause):
        begun = time.perf_counter()
        power_mw = total_mw(sensors.rails_mw())
        if power_mw is not None:
            samples.append(((begun + time.perf_counter()) / 2, power_mw))
        pause = max(0.0, SAMPLE_SECONDS - (time.perf_counter() - begun))


def _sample_lines(process: tegrastats.Process | None, samples: list[Sample], stop: threading.Event) -> None:
    while process and not stop.is_set():
        try:
            line = process.next_line(SAMPLE_SECONDS)
        except EOFError:
            return
        power_mw = total_mw(tegrastats.parse_line(line).power_mw) if line is not None else None
        if power_mw is not None:
            samples.append((time.perf_counter(), power_mw))
