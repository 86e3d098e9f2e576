"""Benchmarks run each case in each repetition, report consistent numbers, and refuse cases that do not fit."""

from __future__ import annotations

import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test

from merino_edge.errors import InputError
from merino_edge.runtime.bench import Case, Result, bench, cases, compare
from merino_edge.runtime.engine import Engine


def test_every_repetition_is_kept_and_rates_agree_with_times(engine: Engine) -> None:
    done: list[None] = []
    requested = cases([20], [10], [0, 30])
    assert [case.name for case in requested] == ["pp20", "pp20@d30", "tg10", "tg10@d30"]
    results = bench({"a": engine}, requested, repetitions=3, on_case=lambda: done.append(None))["a"]
    assert len(done) == 12 and [result.case for result in results] == requested
    for result in results:
        steps = 1 if result.case.kind == "prefill" else 10
        assert len(result.tokens_per_second) == 3 and len(result.step_ms) == 3 * steps
        first_ms = sum(result.step_ms[:steps])
        assert first_ms * result.tokens_per_second[0] == pytest.approx(result.case.tokens * 1e3)
        shown = result.to_dict()
        assert shown["sd"] == statistics.stdev(result.tokens_per_second) and shown["tokens_per_second"] == result.median
        assert min(result.step_ms) <= shown["p50_ms"] <= shown["p95_ms"] <= shown["p99_ms"] <= max(result.step_ms)


def test_the_whole_context_can_be_measured_and_no_more(engine: Engine) -> None:
    whole = Case("prefill", engine.max_positions)
    bench({"a": engine}, [whole], 1)
    for case in (Case("prefill", engine.max_positions, 1), Case("decode", 1, engine.max_positions)):
        with pytest.raises(InputError, match=r"exceed the context of 320.*--context"):
            bench({"a": engine}, [case], 1)


@pytest.mark.parametrize(
    ("counts", "pattern"),
    [
        (([0], [1], [0]), "prompt_tokens is 0"),
        (([1], [-1], [0]), "new_tokens is -1"),
        (([1], [1], [-1]), "depth is -1"),
        (([], [], [0]), "nothing to measure"),
    ],
)
def test_invalid_counts_are_refused_by_name(counts: tuple[list[int], ...], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        cases(*counts)


def test_no_repetitions_are_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="repetitions is 0"):
        bench({"a": engine}, cases([1], [], [0]), 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=8))
def test_the_comparison_is_a_permutation_test_of_signs(exponents: list[tuple[int, int]]) -> None:
    # Powers of two: the sums of whole numbers that SciPy gets are exact. It would miss ties of rounded logarithms.
    first, second = (Result(Case("decode", 1), [2.0**e for e in side], ()) for side in zip(*exponents, strict=True))
    result = compare(first, second)
    logs = np.array([a - b for a, b in exponents], float)
    expected = permutation_test((logs,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert result.p_value == pytest.approx(min(1.0, expected))
    assert result.low <= result.ratio <= result.high


def test_peak_memory_is_that_of_this_process_and_not_of_its_parent() -> None:
    child = "from merino_edge.runtime.memory import peak_memory_mb; print(peak_memory_mb())"
    big_parent = (
        "import subprocess, sys\n"
        "ballast = b'x' * 400_000_000\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    printed = subprocess.run([sys.executable, "-c", big_parent], capture_output=True, text=True, check=True).stdout
    assert 5 < float(printed) < 300
