"""Features: each is on or off with a reason, whatever the driver or a library does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_driver import FakeDriver
from helpers.recorded_boards import expand, orin_rails, write
from helpers.stand_in_gpu import no_compiler
from merino_edge import engine_store, tensorrt_library
from merino_edge.errors import UnsupportedError
from merino_edge.jetson.device.sensors import Sensors
from merino_edge.jetson.doctor import features as module
from merino_edge.jetson.doctor.features import (
    COMPILER,
    GPU,
    GRAPHS,
    PROBED,
    SCATTER,
    SMALLEST_KERNEL,
    TOPK,
    features,
    probe,
)
from merino_edge.runtime.cuda import cuda


def on(found: dict[str, Any]) -> dict[str, bool]:
    return {name: feature["on"] for name, feature in found.items()}


def test_every_part_of_a_gpu_is_tried(gpu: FakeDriver, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.set(integrated=1)
    gpu.add_kernel(*SMALLEST_KERNEL)
    library = SimpleNamespace(Runtime=str, __version__="10.3")
    monkeypatch.setattr(tensorrt_library, "load", lambda name: (library, 0))
    found = dict(probe())
    assert tuple(found) == PROBED
    assert all(on(found)[name] for name in PROBED[:7])
    assert found[GPU]["why"].startswith("SM87, one memory with the CPU") and found["TensorRT"]["why"] == "10.3"
    assert ("PyCUDA" in found[GPU]["why"]) == (package == "pycuda")
    no_compiler(monkeypatch)
    monkeypatch.setattr(cuda.Cuda, "recorded", lambda self, work: None)
    found = dict(probe())
    assert [name for name in PROBED[:5] if not found[name]["on"]] == [COMPILER, SCATTER, TOPK, GRAPHS]
    assert "compiler is missing" in found[SCATTER]["why"] and "steps run without" in found[GRAPHS]["why"]


def test_without_a_gpu_the_first_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise UnsupportedError("no libcuda.so.1", "start the container with --runtime nvidia")

    monkeypatch.setattr(cuda, "Cuda", no_driver)
    found = dict(probe())
    assert tuple(found) == PROBED
    assert found[GPU] == {"on": False, "why": "no libcuda.so.1; start the container with --runtime nvidia"}
    assert not any(on(found)[name] for name in PROBED[:5])


def test_a_driver_that_ends_the_process_does_not_end_the_doctor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = '{"name": "CUDA on the GPU", "on": true, "why": "SM87"}'
    program = write(tmp_path, "python", f"#!/bin/sh\necho noise\necho '{line}'\nkill -SEGV $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = features(Sensors(tmp_path), tmp_path)
    assert found[GPU] == {"on": True, "why": "SM87"}
    assert {found[name]["why"] for name in PROBED[1:]} == {"the try ended by SIGSEGV"}
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert "not tried" in features(Sensors(tmp_path), tmp_path)[GPU]["why"]


@pytest.mark.parametrize(
    ("end", "says"),
    [("kill -40 $$", "the try ended by signal 40"), ("exec sleep 60", "the try did not end within 1 s")],
)
def test_what_was_found_before_a_hang_or_a_signal_without_a_name_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, says: str
) -> None:
    line = '{"name": "CUDA on the GPU", "on": true, "why": "SM87"}'
    begun = '{"name": "top-k ker'  # as of a try that hangs while it prints
    program = write(tmp_path, "python", f"#!/bin/sh\necho '{line}'\nprintf '{begun}'\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(module, "SECONDS", 1)
    found = features(Sensors(tmp_path), tmp_path)
    assert found[GPU] == {"on": True, "why": "SM87"}
    assert {found[name]["why"] for name in PROBED[1:]} == {says}


def test_sensors_and_the_engine_store_are_those_below_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_probed_apart", dict)
    monkeypatch.setenv(engine_store.VARIABLE, str(tmp_path / "store"))
    found = features(Sensors(tmp_path), tmp_path)
    assert on(found) == {"engine store": True, "power sensors": False, "throttle counters": False}
    assert "0 engines of 0 MB" in found["engine store"]["why"]
    orin_rails(expand("jetpack7-orin-nano-super", tmp_path))
    write(tmp_path, "sys/devices/platform/soctherm-oc-event/hwmon/hwmon1/oc1_event_cnt", "3\n")
    found = features(Sensors(tmp_path), tmp_path)
    assert found["power sensors"] == {"on": True, "why": "ina3221 sysfs"}
    assert found["throttle counters"] == {"on": True, "why": "oc1 3"}
    monkeypatch.setenv(engine_store.VARIABLE, "/proc/engines")
    assert "MERINO_ENGINES" in features(Sensors(tmp_path), tmp_path)["engine store"]["why"]
