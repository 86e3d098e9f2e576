"""The profiler: it measures a space's parts on this device and writes the latency table as it goes.

Every finished batch is appended and flushed. So whatever ends a profile, the measurements so far stay, and the table
can be resumed. A profile that measured nothing leaves no file. Clocks, temperatures and throttle counters are read
before, during and after the profile, and recorded. The last lines hold the step-time model and the validation against
whole models. `probe` and `plan` decide what is timed, `timer` how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merino_edge import artefact, forms
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError, OutputError, UnsupportedError
from merino_edge.jetson.device import card as device
from merino_edge.jetson.device.energy import EnergyMeter
from merino_edge.jetson.device.other_load import LoadMeter
from merino_edge.jetson.device.sensors import Reading, Sensors, moved
from merino_edge.jetson.profiler import found
from merino_edge.jetson.profiler.backends import Backend
from merino_edge.jetson.profiler.batching import ProbeBatch, make_batches
from merino_edge.jetson.profiler.found import FindModels
from merino_edge.jetson.profiler.plan import LADDER, Detail, Plan, make_plan
from merino_edge.jetson.profiler.probe import TINY_VOCAB, Probe, Space, Stack
from merino_edge.jetson.profiler.short_plan import short_plan
from merino_edge.jetson.profiler.table_header import Begun, continued_header, make_header
from merino_edge.jetson.profiler.time_budget import DEFAULT_MINUTES, FULL_MINUTES, TimeEstimate, choose_plan
from merino_edge.jetson.profiler.timer import Timer, pinned
from merino_edge.jetson.profiler.validation import conclusion, fitted
from merino_edge.latency.drift import merge_repetitions
from merino_edge.latency.measurement import Measurement, add_checksum
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.table_file import load_table
from merino_edge.latency.transfer import DEFAULT_SHARE, transfer
from merino_edge.presets import preset

EVICTION_HEAD_FACTOR = 1.5  # times the cache before the last, from which the head evicts layers
USED_SHARE = 0.97  # of the time asked for
STEADY_SECONDS = 10.0  # from then on the batches' times correct the estimate
DEFAULT_CACHE_BYTES = 32 * 2**20  # assumed for the last cache where no file says


@dataclass(frozen=True)
class Request:
    """What to measure. `only` is a pattern that an entry's kind, mode and caches ("layer decode warm") must match."""

    space: Space
    space_document: dict[str, Any]  # for the header
    precision: str
    threads: int
    backend: Backend
    minutes: float = DEFAULT_MINUTES
    lengths: Sequence[int] | None = None
    only: str | None = None
    also: Sequence[str] = ()  # public models that are measured as a whole
    find: FindModels | None = None  # how a search with the new table finds models; None: none are measured
    like: LatencyTable | None = None  # a full table of another machine, of which a share is measured here
    share: float = DEFAULT_SHARE


@dataclass
class Progress:
    """The state after a batch. `moved` lists clocks and throttle counters that changed since the beginning.

    While TensorRT compiles, `to_compile` is how many models it must, and `done` how many it has.
    """

    done_seconds: float
    total_seconds: float
    probes: int
    done: int = 0
    moved: list[str] = field(default_factory=list)
    to_compile: int = 0


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Prepared:
    """A plan that fits the time asked for, the header of its table, its time estimate and the timer."""

    plan: Plan
    header: dict[str, Any]
    estimate: TimeEstimate
    timer: Timer

    def batches(
        self, probes: Iterable[Probe] | None = None, measured: Collection[tuple[str, int]] = frozenset()
    ) -> list[ProbeBatch]:
        """The batches of the plan's probes, or of some of them, without those already measured."""
        probes = self.plan.probes if probes is None else probes
        return make_batches(probes, quick=self.plan.quick, max_rounds=self.plan.rounds, measured=measured)

    @property
    def seconds(self) -> float:
        """The estimated duration of the profile."""
        batches = self.batches()
        return self.compile_seconds(self.to_compile(batches)) + self.estimate.seconds(batches)

    def to_compile(self, batches: Sequence[ProbeBatch]) -> list[Architecture]:
        """The models of the batches that TensorRT must compile first, and the reference model."""
        models = self.estimate.to_compile(batches)
        reference = self.timer.reference_model
        return models if not models or self.estimate.is_compiled(reference) else [*models, reference]

    def compile_seconds(self, models: Iterable[Architecture]) -> float:
        """The estimated duration of compiling them."""
        return sum(map(self.estimate.compile_seconds, models))


def prepare(request: Request, begun: dict[str, Any] | None = None) -> Prepared:
    """Choose the plan. `begun` is the header of a table to finish or to extend. Raises InputError."""
    for header in filter(None, (begun, request.like and request.like.header)):
        if forms.problem(header, Begun):
            raise InputError("the table was begun by an older version and cannot be continued", "choose another --out")
    card = device.device_card()
    cache_bytes = device.last_level_cache_bytes(card) or DEFAULT_CACHE_BYTES
    cache_bytes = cache_bytes if request.backend.device == "cpu" else 0  # a GPU's cache is not swept
    eviction_head_bytes = round(EVICTION_HEAD_FACTOR * device.inner_cache_bytes(card)) if cache_bytes else 0
    if begun is not None:
        cache_bytes, eviction_head_bytes = begun.get("cache_bytes", cache_bytes), begun.get("company_bytes", 0)
    quick = request.minutes < FULL_MINUTES if begun is None else begun["quick"]
    covered = begun if begun is not None or request.like is None else request.like.header

    @functools.cache
    def plan_of(detail: Detail) -> Plan:
        if covered is not None and covered.get("space") == request.space_document:
            detail = dataclasses.replace(LADDER[0], rounds=detail.rounds)  # as finely as it was begun
        plan = make_plan(
            request.space,
            request.precision,
            quick=quick,
            lengths=request.lengths,
            begun=covered,
            detail=detail,
            cache_bytes=cache_bytes,
            eviction_head_bytes=eviction_head_bytes,
            cache_capacity=request.backend.cache_capacity,
            also=[preset(name) for name in request.also],
        )
        return plan if request.like is None else short_plan(plan, request.like, request.share, quick=quick)

    sweep_bytes = 2 * cache_bytes if "cold" in plan_of(LADDER[0]).axes.caches else 0
    timer = Timer(
        request.backend,
        request.precision,
        request.threads,
        sweep_bytes=sweep_bytes,
        reference_model=_reference_model(request.space),
        meter=EnergyMeter.of(),
    )

    def estimate_of(plan: Plan) -> TimeEstimate:
        sweep_s = min(timer.sweep() for _ in range(3))
        return TimeEstimate.measure(
            request.backend,
            plan,
            request.precision,
            request.threads,
            sweep_s=sweep_s,
            contention_probe_s=timer.contention_probe_seconds(),
        )

    if request.backend.models:
        models = {a for probe in plan_of(LADDER[0]).probes for a in probe.models}
        largest = max(models, key=lambda a: (a.max_positions, a.parameters))
        request.backend.models().choose_lowering(largest, request.precision, (begun or {}).get("lowering", ""))
    with _own_cores(request):
        found_share = found.SHARE if request.find else 0.0
        plan, estimate = choose_plan(plan_of, estimate_of, 60 * request.minutes * (1 - found_share))
    return Prepared(plan, make_header(request, plan, card, cache_bytes, eviction_head_bytes), estimate, timer)


def profile(
    path: Path, request: Request, *, resume: bool = False, on_progress: OnProgress = lambda progress: None
) -> LatencyTable:
    """Measure into `path` and return the table.

    With `resume` the table at `path` is finished, and extended by what the request needs beyond it. Raises OutputError
    where `path` exists and is not resumed, or cannot be written. Raises InputError where it was begun with other
    options, ArtefactError where it was altered.
    """
    end_s = time.monotonic() + USED_SHARE * 60 * request.minutes
    deadline_s = end_s - (found.SHARE * 60 * request.minutes if request.find else 0.0)
    table = load_table(path, unfinished=True) if resume and path.exists() else None
    if table is None and path.exists():
        raise OutputError(f"{path} exists", "finish it with --continue, or choose another --out")
    prepared = prepare(request, table.header if table else None)
    header, measured = prepared.header, [m for m in table.lines if not m.transferred] if table else []
    conditions = list(table.conditions) if table else []
    wanted = [probe for probe in prepared.plan.probes if _wanted(probe, request.only)]
    batches = prepared.batches(wanted, {(m.key, m.repetition) for m in measured})
    if table:
        header = continued_header(table, header)
        if table.finished and not batches and header is table.header:
            return table
        _rewrite(table, header)
    else:
        artefact.write_text(path, artefact.canonical_json(header) + "\n")
    try:
        _compile(prepared, batches, on_progress)
        deadline_s = max(deadline_s, time.monotonic() + prepared.estimate.seconds(batches))
        with artefact.translate_os_errors(path), open(path, "a", encoding="utf-8") as file:

            def append(lines: Iterable[dict[str, Any]]) -> None:
                lines = list(lines)
                conditions.extend(line for line in lines if line["what"] == "conditions")
                file.writelines(add_checksum(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())

            def measure(batches: Sequence[ProbeBatch], until_s: float) -> None:
                with _own_cores(request):
                    for fresh in _measure(prepared, batches, append, on_progress, until_s):
                        measured.extend(fresh)  # first: from here on an interruption must leave the file
                        append(m.to_line() for m in fresh)

            measure(batches, deadline_s)
            if not prepared.batches(measured={(m.key, m.repetition) for m in measured}):
                if request.like:
                    filled = transfer(request.like, merge_repetitions(measured))
                    measured += filled
                    append(m.to_line() for m in filled)
                if request.find:
                    found_batches = _found_batches(prepared, path, measured, request)
                    _compile(prepared, found_batches, on_progress)
                    if request.backend.models:  # the compilation is not in the time asked for
                        end_s = max(end_s, time.monotonic() + prepared.estimate.seconds(found_batches))
                    measure(found_batches, end_s)
                append(conclusion(path, header, measured, conditions))
    finally:
        if not measured:
            path.unlink(missing_ok=True)
    return load_table(path, unfinished=True)


def _own_cores(request: Request) -> contextlib.AbstractContextManager[None]:
    """Cores of their own for the threads of a CPU's steps. A GPU's need none, and its compiler uses all."""
    return pinned(request.threads) if request.backend.device == "cpu" else contextlib.nullcontext()


def _compile(prepared: Prepared, batches: Sequence[ProbeBatch], on_progress: OnProgress) -> None:
    """Compile what the batches need. A model that is refused is an entry that fails."""
    backend, models = prepared.timer.backend, prepared.to_compile(batches)
    if backend.models is None:
        return
    progress = Progress(0.0, prepared.compile_seconds(models), 0, to_compile=len(models))
    for a in models:
        on_progress(progress)
        with contextlib.suppress(UnsupportedError):
            backend.models().seconds(a, prepared.timer.precision)
        progress.done += 1
        progress.done_seconds += prepared.estimate.compile_seconds(a)


def _measure(
    prepared: Prepared,
    batches: Sequence[ProbeBatch],
    append: Callable[[list[dict[str, Any]]], None],
    on_progress: OnProgress,
    deadline_s: float,
) -> Iterator[list[Measurement]]:
    """Yield the lines of each batch. Where time runs out, batches get fewer rounds."""
    sensors = Sensors()
    total = prepared.estimate.seconds(batches)
    progress = Progress(0.0, total, sum(len(batch.probes) for batch in batches if batch.last))
    on_progress(progress)
    first = sensors.read()
    others = LoadMeter(os.sched_getaffinity(0) if prepared.timer.backend.device == "cpu" else ())
    if batches:
        append([_conditions("before", first, [])])
    started_s = time.monotonic()
    for batch in batches:
        now_s = time.monotonic()
        slower = max(1.0, (now_s - started_s + STEADY_SECONDS) / (progress.done_seconds + STEADY_SECONDS))
        share = (deadline_s - now_s) / (slower * (total - progress.done_seconds + 1))
        entries = prepared.timer.measure(batch.probes, batch.rounds.limited_to(share))
        yield [dataclasses.replace(m, repetition=batch.repetition) for m in entries]
        progress.done += len(batch.probes) if batch.last else 0
        progress.done_seconds += prepared.estimate.seconds([batch])
        others.look()
        now = sensors.read()
        if news := [line for line in moved(first, now) if line not in progress.moved]:
            progress.moved += news
            append([_conditions("during", now, news)])
        on_progress(progress)
    if batches:
        last = sensors.read()
        append([{**_conditions("after", last, moved(first, last)), **_other_load(others)}])


def _conditions(moment: str, reading: Reading, changes: list[str]) -> dict[str, Any]:
    return {"what": "conditions", "moment": moment, **dataclasses.asdict(reading), "moved": changes}


def _other_load(meter: LoadMeter) -> dict[str, Any]:
    """{"other_load": {"of_measured", "of_all", "busiest": [[program, cores], ...]}}, {} where none can be read."""
    load = meter.load()
    return {} if load is None else {"other_load": dataclasses.asdict(load)}


def _found_batches(
    prepared: Prepared, path: Path, measured: list[Measurement], request: Request
) -> Sequence[ProbeBatch]:
    """The batches of models that a search finds with what was measured."""
    assert request.find is not None
    table, seconds = fitted(LatencyTable(path, prepared.header, measured, {}, "")), 60 * request.minutes
    compiled = request.backend.models is not None
    probes = found.found_probes(
        table, measured, request.find, quick=prepared.plan.quick, seconds=seconds, compiled=compiled
    )
    return prepared.batches(list(probes), {(m.key, m.repetition) for m in measured})


def _wanted(probe: Probe, only: str | None) -> bool:
    return only is None or bool(re.search(only, f"{probe.what} {probe.mode} {probe.cache}"))


def _reference_model(space: Space) -> Architecture:
    """A small model of the space's kind, the same for every plan. Its times tell the machine's slowness."""
    base, width = space.models[0], space.widths[len(space.widths) // 2]
    return Stack(base, width, width).model(2, TINY_VOCAB, width)


def _rewrite(table: LatencyTable, header: dict[str, Any]) -> None:
    """Write the file with this header and its measurements, without a cut last line and without a conclusion."""
    lines = [artefact.canonical_json(header)]
    lines += [add_checksum(line) for line in table.conditions]
    lines += [add_checksum(m.to_line()) for m in table.lines if not m.transferred]
    artefact.write_text(table.path, "\n".join(lines) + "\n")
