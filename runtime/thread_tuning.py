"""Thread tuning: measures with how many threads ONNX Runtime runs a bundle fastest on this machine.

It also measures whether idle threads should wait actively (spinning). For a small model one thread can be best: it
finishes a matrix before a second thread has woken up. `merino-edge build` writes the result into the bundle's
manifest, and `open_engine` uses it on a machine with the same processor and number of cores. An entry of "tunings":

    {"cpu", "cores", "onnxruntime", "threads", "spinning", "answer_ms": {tuning: median}}
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
TOLERANCE = 1.03  # a tuning within this ratio of the fastest counts as equally fast
REST_SECONDS = 0.1  # after that, threads that wait actively have gone to sleep


@dataclass(frozen=True)
class Tuning:
    """The thread options of ONNX Runtime for one engine."""

    threads: int
    spinning: bool = False  # idle threads wait actively for some milliseconds, so that they start sooner

    def __str__(self) -> str:
        return f"{self.threads} thread" + ("" if self.threads == 1 else "s" + ", spinning" * self.spinning)


def this_machine() -> dict[str, Any]:
    """What a tuning depends on: the processor, and the number of cores that this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    names = re.findall(r"^(?:model name|CPU implementer|CPU part)\s*:\s*(.+)$", text, re.M)
    return {"cpu": ", ".join(dict.fromkeys(names)), "cores": len(os.sched_getaffinity(0))}


def tuning_for_this_machine(bundle: Bundle) -> Tuning | None:
    """The newest tuning in the bundle that was measured on such a machine; None if there is none.

    Raises ArtefactError for an invalid entry.
    """
    machine = this_machine() if bundle.tunings else {}
    for entry in reversed(bundle.tunings):
        if all(entry.get(key) == value for key, value in machine.items()):
            threads, spinning = entry.get("threads"), entry.get("spinning")
            if type(threads) is not int or not 1 <= threads <= limits.MAX_THREADS or type(spinning) is not bool:
                raise ArtefactError(
                    f"{bundle.path}: {threads!r} threads, spinning {spinning!r}: an invalid tuning",
                    f"measure it again: merino-edge build {bundle.path}",
                )
            return Tuning(threads, spinning)
    return None


def candidate_tunings(cores: int) -> list[Tuning]:
    """Powers of two up to `cores`, and `cores` itself, each without and with spinning; fewest threads first."""
    counts = sorted({*(2**k for k in range(cores.bit_length()) if 2**k < cores), cores})
    return [Tuning(count, spinning) for count in counts for spinning in (False, True) if count > 1 or not spinning]


def tune(
    open_with: Callable[[Tuning], Engine], tunings: Sequence[Tuning], on_answer: Callable[[], None] = lambda: None
) -> dict[Tuning, float]:
    """The median time of a prompt and an answer with each tuning, in ms.

    All engines are open at once and are measured in turns. `on_answer` is called after each answer.
    """
    times_ms: dict[Tuning, list[float]] = {tuning: [] for tuning in tunings}
    with contextlib.ExitStack() as stack:
        engines = {tuning: stack.enter_context(contextlib.closing(open_with(tuning))) for tuning in tunings}
        context = min(engine.max_positions for engine in engines.values())
        prompt = min(PROMPT_TOKENS, max(1, context // 2))
        cases = [Case("prefill", prompt), Case("decode", min(NEW_TOKENS, max(1, context - prompt)), prompt)]
        for number in range(-1, ROUNDS):  # the first warms up
            for tuning in list(engines)[:: -1 if number % 2 else 1]:
                time.sleep(REST_SECONDS)
                spent_s = sum(sum(run_once(engines[tuning], case)) for case in cases if case.depth < context)
                if number >= 0:
                    times_ms[tuning].append(1e3 * spent_s)
                on_answer()
    return {tuning: statistics.median(values) for tuning, values in times_ms.items()}


def timed_answers(tunings: Sequence[Tuning]) -> int:
    """How many answers `tune` runs, including the warm-up."""
    return (ROUNDS + 1) * len(tunings)


def tune_bundle(
    bundle: Bundle, tunings: Sequence[Tuning], on_answer: Callable[[], None] = lambda: None
) -> tuple[Tuning, dict[str, Any]]:
    """Measure `bundle` and write the best tuning into its manifest. Returns the tuning and the manifest's entry.

    Raises OutputError where the manifest cannot be written.
    """

    import onnxruntime

    def open_with(tuning: Tuning) -> OnnxEngine:
        return OnnxEngine.from_bundle(bundle, tuning.threads, spinning=tuning.spinning)

    measured = tune(open_with, tunings, on_answer)
    best = fewest_threads_within_tolerance(measured)
    entry = {
        **this_machine(),
        "onnxruntime": onnxruntime.__version__,  # its package may be onnxruntime-gpu
        "threads": best.threads,
        "spinning": best.spinning,
        "answer_ms": {str(tuning): round(ms, 3) for tuning, ms in measured.items()},
    }
    add_tuning(bundle, entry)
    return best, entry


def fewest_threads_within_tolerance(answer_ms: dict[Tuning, float]) -> Tuning:
    """The first tuning within TOLERANCE of the fastest: in the order of `candidate_tunings`, the fewest threads."""
    fastest_ms = min(answer_ms.values())
    return next(tuning for tuning, ms in answer_ms.items() if ms <= TOLERANCE * fastest_ms)
