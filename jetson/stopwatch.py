"""The clock: times a batch of probes side by side and says what each entry costs.

The exporter's own graphs run in the runtime's own engine, with a fixed number of threads and garbage collection off.
Rounds go over all models of the batch in turn, so that drift falls on all alike. A visit warms a model up and takes
the lower quartile of a burst of calls, since what disturbs a call only makes it slower. An entry is the median over
rounds, its spread the robust variation between them; entries over 2.5% are measured once more and the steadier set is
kept. In a whole model the head's weights pass through the caches between two visits to a layer, so before a call of a
model without the real head as many bytes are read (up to twice the last cache: more changes nothing).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.jetson.probe import Probe
from merino_edge.measurement import MODES, Measurement, Mode, spread_percent
from merino_edge.runtime.onnx_engine import OnnxEngine
from merino_edge.weights import random_weights

BURST_SECONDS = 0.03
BURST_CALLS = (4, 20)


class Visit(NamedTuple):
    """One model at one length; each has an engine of its own, since an engine's cache never shrinks again."""

    model: Architecture
    length: int
    swept: bool


class Stopwatch:
    """Times models at one precision with one number of threads. `sweep_bytes`: what stands in for the head."""

    def __init__(self, precision: str, threads: int, sweep_bytes: int) -> None:
        self.precision, self.threads = precision, threads
        self.sweep = np.ones(sweep_bytes // 8, np.int64)  # zeros would all lie in one page

    def measure(self, probes: list[Probe], rounds: int) -> list[Measurement]:
        """Every probe's entry in both modes; samples in ms, one a round."""
        with contextlib.ExitStack() as stack:
            engines = {v: stack.enter_context(contextlib.closing(self.engine(v.model))) for v in _visits(probes)}
            entries = {m.key: (p, m) for p, m in self._rounds(probes, engines, rounds)}
            unsteady = [p for p in probes if any(p is owner and m.unstable for owner, m in entries.values())]
            for probe, second in self._rounds(unsteady, engines, rounds):
                if spread_percent(second.samples) < spread_percent(entries[second.key][1].samples):
                    entries[second.key] = probe, second
        return [m for _, m in entries.values()]

    def engine(self, a: Architecture) -> OnnxEngine:
        model = build_model(a, random_weights(a), self.precision, a.max_positions)
        return OnnxEngine(to_bytes(model), a, a.max_positions, self.threads)

    def _rounds(
        self, probes: list[Probe], engines: dict[Visit, OnnxEngine], rounds: int
    ) -> Iterator[tuple[Probe, Measurement]]:
        visits = _visits(probes)
        with _no_garbage_collection():
            times = [{visit: self._visit_ms(engines[visit], visit) for visit in visits} for _ in range(rounds)]
        for probe in probes:
            mine = _visits([probe])
            for mode in MODES:
                samples = tuple(
                    probe.cost_ms(mode, {m: [one_round[v][m] for v in mine] for m in MODES}) for one_round in times
                )
                yield probe, Measurement(probe.what, mode, probe.length, probe.shape, samples)

    def _visit_ms(self, engine: OnnxEngine, visit: Visit) -> dict[Mode, float]:
        prefill_ms = self._burst_ms(engine, visit, visit.length, 0)  # first: fills the cache that decode reads
        return {"decode": self._burst_ms(engine, visit, 1, visit.length - 1), "prefill": prefill_ms}

    def _burst_ms(self, engine: OnnxEngine, visit: Visit, count: int, start: int) -> float:
        """The lower quartile of a burst of steps of `count` tokens, after one step to warm up."""
        tokens = np.arange(count, dtype=np.int64) % engine.vocab_size
        engine.forward(tokens, start)
        samples: list[float] = []  # s
        while len(samples) < BURST_CALLS[0] or (sum(samples) < BURST_SECONDS and len(samples) < BURST_CALLS[1]):
            if visit.swept:
                self.sweep.sum()
            begun = time.perf_counter()
            engine.forward(tokens, start)
            samples.append(time.perf_counter() - begun)
        return 1000 * float(np.quantile(samples, 0.25))


def _visits(probes: list[Probe]) -> list[Visit]:
    """Each different model and length once, in order."""
    return list(dict.fromkeys(Visit(a, p.length, not p.has_head) for p in probes for a in p.models))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
