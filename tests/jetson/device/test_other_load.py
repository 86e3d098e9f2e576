"""Other load, from recorded files whose sums are known, and a program that really runs beside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.recorded_boards import write
from merino_edge.jetson.device import other_load
from merino_edge.jetson.device.other_load import STOLEN, LoadMeter, OtherLoad


def write_proc(root: Path, cores: list[tuple[int, int]], programs: dict[int, tuple[str, int]]) -> None:
    """`cores`: (ticks busy, ticks stolen) of each; `programs`: (name, ticks) by process."""
    lines = [f"cpu{i} {busy} 0 0 900 5 0 0 {stolen} 0 0" for i, (busy, stolen) in enumerate(cores)]
    write(root, "proc/stat", "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5"]) + "\n")
    for process, (name, ticks) in programs.items():
        write(root, f"proc/{process}/stat", f"{process} ({name}) R 1 1 1 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1\n")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds passed, seconds that the own process used], which a test sets."""
    now = [0.0, 0.0]
    monkeypatch.setattr(other_load.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(other_load.os, "times", lambda: os.times_result((now[1], 0.0, 0.0, 0.0, 0.0)))
    return now


def test_what_the_own_process_did_not_use_was_others(tmp_path: Path, clock: list[float]) -> None:
    ticks = round(1 / other_load.TICK_S)
    write_proc(tmp_path, [(100, 0), (100, 0)], {7: ("a (b) c", 50)})
    meter = LoadMeter({0}, tmp_path)
    clock[:] = 10.0, 6.0
    write_proc(tmp_path, [(100 + 8 * ticks, 0), (100 + 5 * ticks, ticks)], {7: ("a (b) c", 50 + 7 * ticks)})
    load = meter.load()
    assert load is not None and load.of_measured == pytest.approx(0.2)  # 8 of 10 s on core 0, 6 of them its own
    assert load.of_all == pytest.approx((8 + 5 + 1 - 6) / 20)
    assert load.busiest == (("a (b) c", 0.7), (STOLEN, 0.1))


def test_a_program_that_ended_is_named_all_the_same(tmp_path: Path, clock: list[float]) -> None:
    ticks = round(1 / other_load.TICK_S)
    write_proc(tmp_path, [(0, 0)], {})
    meter = LoadMeter({0}, tmp_path)
    write_proc(tmp_path, [(4 * ticks, 0)], {9: ("short", 4 * ticks)})
    meter.look()
    (tmp_path / "proc/9/stat").unlink()
    clock[0] = 8.0
    load = meter.load()
    assert load is not None and load.busiest == (("short", 0.5),)


def test_where_the_system_tells_nothing_there_is_no_load(tmp_path: Path, clock: list[float]) -> None:
    meter = LoadMeter({0}, tmp_path)
    clock[0] = 5.0
    assert meter.load() is None


def test_on_a_gpu_only_the_share_of_all_cores_counts(tmp_path: Path, clock: list[float]) -> None:
    write_proc(tmp_path, [(0, 0)], {})
    meter = LoadMeter((), tmp_path)
    clock[0] = 1.0
    write_proc(tmp_path, [(round(1 / other_load.TICK_S), 0)], {})
    assert meter.load() == OtherLoad(0.0, 1.0, ())


def test_a_busy_program_beside_this_one_is_seen() -> None:
    meter = LoadMeter(os.sched_getaffinity(0))
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", busy])
    try:
        while (spent := meter._read().programs_s.get(child.pid, 0.0)) < 0.3:
            assert child.poll() is None
            time.sleep(0.02)
        load = meter.load()
    finally:
        child.kill()
        child.wait()
    assert spent >= 0.3 and meter._spent_s[child.pid] >= 0.3
    assert load is not None and load.of_all > 0 and meter._names[child.pid].startswith("python")
