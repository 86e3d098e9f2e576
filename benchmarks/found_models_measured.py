"""Predicted against measured for models that searches find: the error, the winner's curse, and what the interval holds.

    python benchmarks/found_models_measured.py --out T.jsonl [--space demo] [--precision int4] [--threads 1]
        [--minutes 10] [--mode decode] [--count 20] [--visits 5] [--rounds 12]

A table at --out is taken as it is; where there is none, it is profiled first. Searches with three scores then find
--count models, under budgets between the table's fast and slow models. None of them was measured for the table. All are
measured in turns, --visits times in another order. The machine may have become slower or faster since the profile. So
the table's held-out models are measured again in the same turns: `by the held-out models` divides times by the median
ratio of theirs to those in the table. `by the reference model` divides by the slowness that it tells.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merino_edge.architecture import Architecture
from merino_edge.jetson.device import card
from merino_edge.jetson.profiler import probe, profiler
from merino_edge.jetson.profiler.backends import backend_named
from merino_edge.jetson.profiler.timer import Rounds, Timer, pinned
from merino_edge.jetson.profiler.validation import error_figures
from merino_edge.latency.drift import DriftCorrection, repetitions_by_key
from merino_edge.latency.measurement import Measurement, Mode
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.table_file import load_table
from merino_edge.search import space_file
from merino_edge.search.builtin_spaces import SPACES, load_space
from merino_edge.search.found_models import found_models
from merino_edge.search.space import Space

SEARCH_SECONDS = 120.0
TOGETHER = 5  # models that are timed side by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table")
    parser.add_argument("--space", default="demo")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--mode", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    table = load_table(options.out) if options.out.exists() else profiled(options)
    space = space_file.from_dict(table.header["space"], str(options.out), SPACES)
    mode: Mode = options.mode
    found = found_models(
        space, table, mode, count=options.count, seconds=SEARCH_SECONDS, without=known_models(table, mode)
    )
    held_out = [m for m in table.measurements if (m.what, m.mode) == ("model", mode) and not m.failed]
    lines = measured(table, space, found, held_out, mode, visits=options.visits, rounds=options.rounds)
    print(f"{table.path}: {table.precision}, {table.header['threads']} threads; verdict {table.verdict}")
    report(table, lines, held_out, mode)


def profiled(options: argparse.Namespace) -> LatencyTable:
    space = load_space(options.space)
    backend = backend_named("onnxruntime-cpu")

    def find(table: LatencyTable, mode: Mode, count: int, seconds: float, without: object) -> list[Architecture]:
        return found_models(space, table, mode, count=count, seconds=seconds, without=without)  # type: ignore[arg-type]

    document = space_file.to_dict(space)
    request = profiler.Request(space, document, options.precision, options.threads, backend, options.minutes)
    return profiler.profile(options.out, replace(request, find=find))


def known_models(table: LatencyTable, mode: Mode) -> set[Architecture]:
    """The whole models that were measured for the table."""
    wholes = (m for m in table.measurements if m.mode == mode and "architecture" in m.shape)
    return {Architecture.from_dict(m.shape["architecture"]) for m in wholes}


def measured(
    table: LatencyTable,
    space: Space,
    models: Sequence[Architecture],
    held_out: Sequence[Measurement],
    mode: Mode,
    *,
    visits: int,
    rounds: int,
) -> list[Measurement]:
    """A line for each visit to each found model, and to each held-out one."""
    header, lines = table.header, []
    swept = any(m.cache == "cold" for m in table.measurements)
    timer = Timer(
        backend_named(header["backend"]),
        table.precision,
        header["threads"],
        sweep_bytes=2 * (card.last_level_cache_bytes(card.device_card()) or 2**25) if swept else 0,
        reference_model=profiler._reference_model(space),
    )
    probes = [probe.whole("found", mode, table.default_length, a) for a in models]
    probes += [probe.whole("model", mode, m.length, Architecture.from_dict(m.shape["architecture"])) for m in held_out]
    for visit in range(visits):
        random.Random(visit).shuffle(probes)
        with pinned(header["threads"]):
            for start in range(0, len(probes), TOGETHER):
                batch = timer.measure(probes[start : start + TOGETHER], Rounds(rounds, rounds))
                lines += [replace(m, repetition=visit) for m in batch]
    return lines


def report(table: LatencyTable, lines: list[Measurement], held_out: Sequence[Measurement], mode: Mode) -> None:
    drift, step = DriftCorrection([*table.lines, *lines]), Step(mode, table.default_length)
    found = [m for m in lines if m.what == "found"]
    before = {m.key: m.median_ms for m in held_out}
    again = repetitions_by_key(m for m in lines if m.what == "model")
    slower = statistics.median(median_ms(visits) / before[key] for key, visits in again.items())
    print(f"the held-out models take {100 * (slower - 1):+.1f} % more than in the table")
    ways = {
        "as it is": lambda m: 1.0,
        "by the reference model": drift.slowness,
        "by the held-out models": lambda m: slower,
    }
    for name, slowness in ways.items():
        pairs, inside, inside_any, apart = [], 0, 0, []
        for visits in repetitions_by_key(found).values():
            predicted = table.model_cost(Architecture.from_dict(visits[0].shape["architecture"]), step)
            times = [statistics.median(m.samples) / slowness(m) for m in visits]
            ms = statistics.median(times)
            pairs.append((predicted, ms))
            apart += [100 * abs(time / ms - 1) for time in times]
            inside += within(table, predicted, ms, step, found=True)
            inside_any += within(table, predicted, ms, step, found=False)
        figures = error_figures(pairs)
        expected = [(value, ms) for predicted, ms in pairs if (value := table.expected(predicted, step)) is not None]
        corrected = f"{error_figures(expected)['mape_percent']:.1f} %" if expected else "not known"
        print(
            f"{name}: {len(pairs)} found models, MAPE {figures['mape_percent']:.1f} %, "
            f"of the expected times {corrected}, "
            f"winner's curse {-figures['bias_percent']:+.1f} % (measured above predicted), "
            f"{inside} within the printed interval ({inside_any} within that of random models), "
            f"visits {statistics.fmean(apart):.1f} % apart"
        )
    for predicted, ms in sorted(pairs):
        print(f"    predicted {predicted:8.3f} ms, measured {ms:8.3f} ms, {100 * (ms / predicted - 1):+6.1f} %")


def median_ms(visits: Sequence[Measurement]) -> float:
    return statistics.median(statistics.median(m.samples) for m in visits)


def within(table: LatencyTable, predicted: float, ms: float, step: Step, *, found: bool) -> bool:
    interval = table.interval(predicted, step, found=found)
    return interval is not None and interval.low <= ms <= interval.high


if __name__ == "__main__":
    main()
