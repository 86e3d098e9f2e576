"""How ONNX Runtime should run a bundle on this machine: threads, and whether they wait for work actively.

`tune` measures the possibilities in turns; `merino-edge build` keeps the best in the bundle's manifest, an entry of
"tunings" {"cpu", "cores", "onnxruntime", "threads", "spinning", "answer_ms": {possibility: median}}, and whoever opens
the bundle on such a machine runs it so. A small model is done with a matrix before a second thread has woken up.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merino_edge import limits
from merino_edge.bundle import Bundle, add_tuning
from merino_edge.errors import ArtefactError
from merino_edge.runtime.bench import Case, run_once
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

ROUNDS = 7
PROMPT_TOKENS, NEW_TOKENS = 64, 64  # of the answer that is timed
CLOSE = 1.03  # times the least: as good as it, where it takes fewer threads
REST_SECONDS = 0.1  # until threads that wait actively have given up


@dataclass(frozen=True)
class Tuning:
    threads: int
    spinning: bool = False  # threads without work wait actively for some milliseconds, which wakes them faster

    def __str__(self) -> str:
        return f"{self.threads} thread" + ("" if self.threads == 1 else "s" + ", spinning" * self.spinning)


def this_machine() -> dict[str, Any]:
    """What has to be the same for a measurement to hold: the processor and how many cores this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    named = re.findall(r"^(?:model name|CPU implementer|CPU part)\s*:\s*(.+)$", text, re.M)
    return {"cpu": ", ".join(dict.fromkeys(named)), "cores": len(os.sched_getaffinity(0))}


def tuning_for_this_machine(bundle: Bundle) -> Tuning | None:
    """What was measured on such a machine last. Raises ArtefactError for an entry that is none."""
    machine = this_machine() if bundle.tunings else {}
    for entry in reversed(bundle.tunings):
        if all(entry.get(key) == value for key, value in machine.items()):
            threads, spinning = entry.get("threads"), entry.get("spinning")
            if type(threads) is not int or not 1 <= threads <= limits.MAX_THREADS or type(spinning) is not bool:
                raise ArtefactError(
                    f"{bundle.path}: {threads!r} threads, spinning {spinning!r}: no way to run it",
                    f"measure it again: merino-edge build {bundle.path}",
                )
            return Tuning(threads, spinning)
    return None


def candidate_tunings(cores: int) -> list[Tuning]:
    """The leanest first: threads in powers of two up to the cores, each without and with spinning."""
    counts = sorted({*(2**k for k in range(cores.bit_length()) if 2**k < cores), cores})
    return [Tuning(count, spinning) for count in counts for spinning in (False, True) if count > 1 or not spinning]


def tune(
    open_with: Callable[[Tuning], Engine], found: Sequence[Tuning], on_answer: Callable[[], None] = lambda: None
) -> dict[Tuning, float]:
    """Of each the median milliseconds of a prompt and an answer, all open at once and measured in turns."""
    times_ms: dict[Tuning, list[float]] = {tuning: [] for tuning in found}
    with contextlib.ExitStack() as stack:
        engines = {tuning: stack.enter_context(contextlib.closing(open_with(tuning))) for tuning in found}
        context = min(engine.max_positions for engine in engines.values())
        prompt = min(PROMPT_TOKENS, max(1, context // 2))
        wanted = [Case("prefill", prompt), Case("decode", min(NEW_TOKENS, max(1, context - prompt)), prompt)]
        for number in range(-1, ROUNDS):  # the first warms up
            for tuning in list(engines)[:: -1 if number % 2 else 1]:
                time.sleep(REST_SECONDS)
                spent_s = sum(sum(run_once(engines[tuning], case)) for case in wanted if case.depth < context)
                if number >= 0:
                    times_ms[tuning].append(1e3 * spent_s)
                on_answer()
    return {tuning: statistics.median(values) for tuning, values in times_ms.items()}


def timed_answers(tried: Sequence[Tuning]) -> int:
    """How many answers `tune` times, the warm-up included."""
    return (ROUNDS + 1) * len(tried)


def tune_bundle(
    bundle: Bundle, tried: Sequence[Tuning], on_answer: Callable[[], None] = lambda: None
) -> tuple[Tuning, dict[str, Any]]:
    """Measure `bundle` and keep the best tuning in its manifest; that, and its entry. Raises OutputError."""

    def open_with(tuning: Tuning) -> OnnxEngine:
        return OnnxEngine.from_bundle(bundle, tuning.threads, spinning=tuning.spinning)

    measured = tune(open_with, tried, on_answer)
    best = fewest_threads_within_tolerance(measured)
    entry = {
        **this_machine(),
        "onnxruntime": version("onnxruntime"),
        "threads": best.threads,
        "spinning": best.spinning,
        "answer_ms": {str(tuning): round(ms, 3) for tuning, ms in measured.items()},
    }
    add_tuning(bundle, entry)
    return best, entry


def fewest_threads_within_tolerance(answer_ms: dict[Tuning, float]) -> Tuning:
    """The first, in the order of `possibilities`, that is as fast as the fastest within what a measurement can tell."""
    least = min(answer_ms.values())
    return next(tuning for tuning, ms in answer_ms.items() if ms <= CLOSE * least)
