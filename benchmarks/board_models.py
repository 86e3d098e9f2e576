"""The models of a board report: measured here, each in a process of its own, and predicted in two ways.

    python benchmarks/board_models.py smollm2-135m int4 --backend tensorrt    # prints what `measure` returns

Weights are random, since they do not change how long a step takes. Energy is measured in a run of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import time
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError, MerinoError
from merino_edge.jetson.device.energy import EnergyMeter
from merino_edge.jetson.device.sensors import Sensors, moved
from merino_edge.jetson.estimate.boards import BOARDS
from merino_edge.jetson.estimate.roofline import Roofline, runtime
from merino_edge.jetson.profiler.backends import backend_named
from merino_edge.jetson.profiler.timer import pinned
from merino_edge.latency.measurement import MODES
from merino_edge.latency.table import LatencyTable
from merino_edge.presets import preset
from merino_edge.runtime.bench import Case, bench, run_once
from merino_edge.runtime.memory import MemoryWatch, peak_memory_mb
from merino_edge.search.builtin_spaces import EDGE, SPACES
from merino_edge.search.space_file import from_dict

CONTEXT, STEPS = 256, 32  # positions of the cache; decode steps at its end
REPETITIONS, ENERGY_SECONDS = 7, 5.0
THREADS = 1  # of a CPU backend, as in a latency table
# Two presets of other kinds than the profile's space, and three models that its table can predict. All fit 4 GB.
FROM_EDGE = {"edge-20m": 1, "edge-67m": 3}  # name: seed of the draw from the space
MODELS = ("smollm2-135m", *FROM_EDGE, "merino-64m", "opt-125m")
PRECISIONS = ("int4", "fp16")
# For a trial in seconds, on any machine.
TINY_SPACE = {
    "kind": "space", "schema_version": 2, "name": "tiny", "base": "demo", "blocks": 1, "widths": [64],
    "ffn_ratios": [1, 2], "layers": [1, 2], "embedding_widths": 64,
}  # fmt: skip
TINY_MODELS = ("tiny-0", "tiny-1")


def architecture(name: str) -> Architecture:
    """The model called `name`, with a context that is measured in little time."""
    kind, _, seed = name.rpartition("-")
    if kind == "tiny":
        space = from_dict(TINY_SPACE, "the tiny space", SPACES)
        a = space.architecture(space.sample(random.Random(int(seed))))
    elif name in FROM_EDGE:
        a = EDGE.architecture(EDGE.sample(random.Random(FROM_EDGE[name])))
    else:
        a = preset(name)
    return dataclasses.replace(a, max_positions=CONTEXT)


def measure(name: str, precision: str, backend: str, repetitions: int, energy_seconds: float) -> dict[str, Any]:
    """How fast the model runs here, and what it takes.

    {"model", "precision", "backend", "threads", "architecture", "parameters", "weight_mb", "open_seconds",
     "open_memory_mb", "peak_memory_mb", "tests": [merino_edge.runtime.bench.Result], "energy": {"tokens", "seconds",
     "tokens_per_joule", "watts"} or null, "power_source", "reading": sensors now, "load_average" before,
     "notes": [line]}
    """
    a, sensors = architecture(name), Sensors()
    before, load = sensors.read(), os.getloadavg()[0]
    chosen, began = backend_named(backend), time.perf_counter()
    with MemoryWatch() as watch:
        engine = chosen.engine(a, precision, THREADS)
    opened_s = time.perf_counter() - began
    own_core = pinned(THREADS) if chosen.device == "cpu" else contextlib.nullcontext()  # as `profile` has it
    with contextlib.closing(engine), own_core:
        cases = [Case("prefill", CONTEXT), Case("decode", STEPS, CONTEXT - STEPS)]
        results = bench({name: engine}, cases, repetitions)[name]
        energy = _energy(engine, cases[1], energy_seconds)
    after = sensors.read()
    return {
        "model": name,
        "precision": precision,
        "backend": backend,
        "threads": THREADS if chosen.device == "cpu" else None,
        "architecture": a.to_dict(),
        "parameters": a.parameters,
        "weight_mb": a.weight_bytes(precision) / 1e6,
        "open_seconds": opened_s,
        "open_memory_mb": watch.taken_bytes / 1e6,
        "peak_memory_mb": peak_memory_mb(),
        "tests": [result.to_dict() for result in results],
        "energy": energy,
        "power_source": sensors.power_source,
        "reading": dataclasses.asdict(after),
        "load_average": load,
        "notes": [*moved(before, after), *chosen.warnings],
    }


def _energy(engine: Any, case: Case, seconds: float) -> dict[str, float] | None:
    """Of decode steps that go on for `seconds`: a board's sensors give 20 samples a second."""
    meter = EnergyMeter.of()
    if meter is None:
        return None
    tokens, deadline = 0, time.perf_counter() + seconds
    with meter.measuring() as used:
        while not tokens or time.perf_counter() < deadline:
            run_once(engine, case)
            tokens += case.tokens
    if not used.energy_mj:
        return None
    return {
        "tokens": tokens,
        "seconds": used.seconds,
        "tokens_per_joule": 1000 * tokens / used.energy_mj,
        "watts": used.energy_mj / 1000 / used.seconds,
    }


# --- predictions -----------------------------------------------------------------------------------


def predictions(
    measured: dict[str, Any], card: dict[str, Any], mode: str, table: LatencyTable | None
) -> dict[str, Any]:
    """What the estimate for this board and the profile's table say of a measured model, beside what was measured.

    {"estimate" and "table": {"decode" and "prefill": {"predicted_ms", "measured_ms", "error_percent"} or
     {"none": the reason}}}
    """
    a = Architecture.from_dict(measured["architecture"])
    tests = {test["kind"]: test["p50_ms"] for test in measured["tests"]}
    found: dict[str, Any] = {"estimate": {}, "table": {}}
    for kind in MODES:
        for source in found:
            try:
                if source == "estimate":
                    ms = _roofline(card, mode).model_ms(a, kind, CONTEXT, measured["precision"])
                else:
                    ms = _of_table(table, measured).model_ms(a, kind, CONTEXT)
            except MerinoError as refusal:
                found[source][kind] = {"none": str(refusal)}
                continue
            error = 100 * (ms / tests[kind] - 1)
            found[source][kind] = {"predicted_ms": ms, "measured_ms": tests[kind], "error_percent": error}
    return found


def _roofline(card: dict[str, Any], mode: str) -> Roofline:
    title = f"Jetson {str(card['module_name']).removesuffix(' (developer kit)')}"
    for board in BOARDS:
        if board.title == title:
            return Roofline(board, board.mode(mode), runtime("merino-edge"))
    raise InputError(f"no board of `estimate` is this one (module {card['module']})", "merino-edge estimate lists them")


def _of_table(table: LatencyTable | None, measured: dict[str, Any]) -> LatencyTable:
    if table is None:
        raise InputError("the profile left no table", "run the report again")
    if table.precision != measured["precision"]:
        raise InputError(f"the table is for {table.precision}", "profile at this precision too")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("precision")
    parser.add_argument("--backend", default="onnxruntime-cpu")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--energy-seconds", type=float, default=ENERGY_SECONDS)
    options = parser.parse_args()
    try:
        found = measure(options.model, options.precision, options.backend, options.repetitions, options.energy_seconds)
    except MerinoError as refusal:
        raise SystemExit(str(refusal)) from None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
