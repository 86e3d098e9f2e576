"""How many CPU threads run models of a space fastest here: measured, because it depends on what else the machine does.

A small model on a busy machine is often several times slower with two threads than with one: each step then waits for
the thread that was interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass

from merino_edge.architecture import Architecture
from merino_edge.jetson.profiler.random_graph import random_graph
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.thread_tuning import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Tuning,
    candidate_tunings,
    fewest_threads_within_tolerance,
    tune,
)


@dataclass(frozen=True)
class ThreadCount:
    """The number of threads to use, and the speed that every number was measured with, in tokens/s."""

    threads: int
    tokens_per_s: dict[int, float]


def measure_threads(a: Architecture, precision: str, cores: int) -> ThreadCount:
    """Time answers of `a`, with random weights, on one thread up to all `cores`, in turns."""
    graph = random_graph(a, precision, "onnxruntime", "ort")

    def engine(tuning: Tuning) -> OnnxEngine:
        return OnnxEngine(graph, a, a.max_positions, tuning.threads)

    answer_ms = tune(engine, [tuning for tuning in candidate_tunings(cores) if not tuning.spinning])
    tokens = min(PROMPT_TOKENS + NEW_TOKENS, a.max_positions)
    speeds = {tuning.threads: 1e3 * tokens / ms for tuning, ms in answer_ms.items()}
    return ThreadCount(fewest_threads_within_tolerance(answer_ms).threads, speeds)
