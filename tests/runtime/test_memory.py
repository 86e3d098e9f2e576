"""The machine's free memory: what a GPU that shares it can take, and how far it fell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from helpers.fake_driver import FakeDriver
from helpers.recorded_boards import write
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import UnsupportedError
from merino_edge.runtime import memory
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.memory import MemoryWatch, check_gpu_memory, gpu_free_bytes, meminfo_bytes

CMA = "MemTotal: 7665664 kB\nMemAvailable: 2000000 kB\nSwapFree: 4000000 kB\nCmaTotal: 262144 kB\nCmaFree: 250000 kB\n"


def test_a_gpu_gets_neither_swap_nor_the_contiguous_allocator_s_pages(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", CMA)
    assert gpu_free_bytes(tmp_path) == (2_000_000 - 250_000) * 1024
    check_gpu_memory("loading", 1_750_000 * 1024, tmp_path)
    with pytest.raises(UnsupportedError) as refusal:
        check_gpu_memory("loading", 1_750_001 * 1024, tmp_path)
    said = str(refusal.value)
    assert "loading needs about 1,792 MB of GPU memory, 1,792 MB are free (256 MB more only in CMA)" in said
    assert "error 12" in said and "\n" not in said


def test_what_the_system_does_not_say_refuses_nothing(tmp_path: Path) -> None:
    assert gpu_free_bytes(tmp_path) is None
    check_gpu_memory("loading", 2**60, tmp_path)
    write(tmp_path, "proc/meminfo", "MemAvailable: 10 kB\n")  # a board without CMA
    assert gpu_free_bytes(tmp_path) == 10 * 1024 and meminfo_bytes("CmaFree", tmp_path) is None


def test_a_watch_keeps_the_lowest_point(tmp_path: Path) -> None:
    def say(available_kb: int) -> None:
        write(tmp_path, "next", f"MemAvailable: {available_kb} kB\n").replace(tmp_path / "proc/meminfo")

    write(tmp_path, "proc/meminfo", "")
    say(1000)
    watch = MemoryWatch(tmp_path)
    for available_kb in (400, 900):
        say(available_kb)
        watch.sample()
    assert watch.taken_bytes == 600 * 1024
    with watch:  # samples by itself
        say(300)
        while watch.taken_bytes < 700 * 1024:
            time.sleep(0.01)
    assert watch.taken_bytes == 700 * 1024


@pytest.mark.parametrize("unified", [True, False])
def test_an_engine_that_does_not_fit_is_refused_before_it_is_loaded(
    gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch, unified: bool
) -> None:
    """A GPU with memory of its own is asked by CUDA alone. There the plan, which is none, is loaded."""
    a = Architecture(60, 1024, 64, 64, (Block(64, 2, 1, 1, 64),))
    gpu.set(integrated=int(unified))
    monkeypatch.setattr(memory, "meminfo_bytes", lambda field, root="/": a.kv_bytes(1024) if "Mem" in field else 0)
    with pytest.raises(Exception) as refusal:  # noqa: PT011
        TensorRtEngine("any", {1024: b"a plan"}, a)
    assert ("opening the engine needs about" in str(refusal.value)) == unified
    assert isinstance(refusal.value, UnsupportedError) == unified
