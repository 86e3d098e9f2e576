"""The doctor: what verbs lack, and the block that is printed for a board and for a machine without anything."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from helpers.recorded_boards import JETPACK7, expand, write_tegrastats
from merino_edge.cli import doctor as doctor_verb
from merino_edge.cli.verbs import VERBS
from merino_edge.jetson.doctor import doctor


def test_the_block_of_a_board_reads_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tegrastats(expand("jetpack7-orin-nano-super", tmp_path), f"echo '{JETPACK7}'; sleep 60")
    text = "\n".join(doctor_verb._lines(doctor.examine(tmp_path)))
    for line in (
        "  power mode       pmode:0001 fmode:quiet (25W)",
        "  gpu              tpc_pg_mask 240, sm_count 8, max_mhz 918",
        "  power source     tegrastats",
        "  power [mW]       VDD_IN 3462, VDD_CPU_GPU_CV 442, VDD_SOC 1127",
        "  clock [MHz]      cpu 960, gpu 306, emc 665.6",
        "  throttle events  none can be read",
        "findings",
        "  no swap for builds: 7.3 GiB of memory, no swap on a disk",
    ):
        assert line in text.splitlines()


def test_a_machine_without_traps_says_so(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path)
    assert set(found["sensors"]) == {
        "power_source",
        "power_mw",
        "temperature_c",
        "clock_mhz",
        "throttle_events",
        "power_mode",
    }
    assert list(doctor_verb._lines({**found, "traps": []}))[-1] == "findings: none"


def test_every_verb_is_examined() -> None:
    assert set(doctor.NEEDS) | {"doctor"} == set(VERBS)


def test_what_is_missing_comes_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    have = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda package: None if package in ("torch", "rich") else have(package))
    verbs = doctor.examine()["verbs"]
    assert (
        verbs["train"]["missing"] == ["rich", "torch"] and verbs["train"]["fix"] == "pip install 'merino-edge[train]'"
    )
    assert verbs["search"] == {"ok": False, "missing": ["rich"], "fix": "pip install merino-edge"}


@pytest.mark.parametrize("python", ["", "python3", "python3.7"])  # of the system's TensorRT; "": there is none
def test_on_a_board_pip_never_brings_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    if python:
        (tmp_path / "usr/lib" / python / "dist-packages/tensorrt").mkdir(parents=True)
    have = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "tensorrt" else have(package))
    purpose = "engines of TensorRT on a board (build)"
    for machine, says in (
        ("aarch64", "--system-site-packages"),
        ("x86_64", "pip install 'merino-edge[tensorrt,export]'"),
    ):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        fix = doctor.examine(tmp_path)["optional"][purpose]["fix"]
        assert says in fix and ("[tensorrt" in fix) == (machine == "x86_64")


def test_pycuda_does_instead_of_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in ("pycuda", "cuda-bindings", ""):
        monkeypatch.setattr(
            doctor, "installed", lambda package, installed=installed: "1" if package == installed else None
        )
        missing = doctor.examine()["optional"]["engines of TensorRT on a board (build)"]["missing"]
        assert ("cuda-bindings" in missing) == (installed == "")


def test_a_package_that_nobody_has_is_not_installed() -> None:
    assert doctor.installed("no-such-package") is None
    assert doctor.installed("no.such.package") is None
    assert doctor.installed("numpy")
