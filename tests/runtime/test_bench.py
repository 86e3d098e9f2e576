"""The benchmark measures what it says, as often as it was told, and refuses what does not fit."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

from merino_edge.errors import InputError
from merino_edge.runtime.bench import Measurement, bench
from merino_edge.runtime.engine import Engine


def test_every_repetition_is_kept_and_rates_agree_with_times(engine: Engine) -> None:
    done: list[None] = []
    result = bench(engine, prompt_tokens=20, new_tokens=10, repetitions=3, on_repetition=lambda: done.append(None))
    assert len(done) == 3
    for measurement in (result.first_token_ms, result.prefill_tokens_per_second, result.decode_tokens_per_second):
        assert len(measurement.samples) == 3
        assert min(measurement.samples) > 0
    for first_ms, rate in zip(result.first_token_ms.samples, result.prefill_tokens_per_second.samples, strict=True):
        assert first_ms * rate == pytest.approx(20 * 1e3)


def test_the_whole_context_can_be_measured_and_no_more(engine: Engine) -> None:
    bench(engine, engine.max_positions - 1, 1, 1)
    with pytest.raises(InputError, match=r"exceed the context of 320.*--context"):
        bench(engine, engine.max_positions, 1, 1)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repetitions"])
def test_counts_below_one_are_refused_by_name(engine: Engine, name: str) -> None:
    with pytest.raises(InputError, match=name):
        bench(engine, **{name: 0})


def test_median_and_spread() -> None:
    samples = (3.0, 1.0, 2.0, 10.0)
    measurement = Measurement(samples)
    assert measurement.median == 2.5
    assert measurement.spread() == {"min": 1.0, "max": 10.0, "sd": statistics.stdev(samples)}
    assert Measurement((1.0,)).spread()["sd"] is None


def test_peak_memory_is_this_process_s_and_not_its_parent_s() -> None:
    child = "from merino_edge.runtime.bench import peak_memory_mb; print(peak_memory_mb())"
    big_parent = (
        "import subprocess, sys\n"
        "ballast = b'x' * 400_000_000\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    printed = subprocess.run([sys.executable, "-c", big_parent], capture_output=True, text=True, check=True).stdout
    assert 5 < float(printed) < 300
