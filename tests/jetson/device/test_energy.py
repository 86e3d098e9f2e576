"""Energy: the integral on known powers; rails rewritten while work runs; a real program in tegrastats' place; RAPL."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.recorded_boards import JETPACK7, break_reading, orin_rails, write, write_rail, write_tegrastats
from merino_edge.jetson.device.energy import EnergyMeter, integral_mj
from merino_edge.jetson.device.sensors import Sensors

FOREVER = f"while :; do echo '{JETPACK7}'; sleep 0.02; done"


def package(root: Path, zone: str, name: str, energy_uj: object, span_uj: int = 262143328850) -> Path:
    """A powercap zone as https://docs.kernel.org/power/powercap/powercap.html describes it."""
    folder = f"sys/class/powercap/{zone}"
    write(root, f"{folder}/name", f"{name}\n")
    write(root, f"{folder}/max_energy_range_uj", f"{span_uj}\n")
    return write(root, f"{folder}/energy_uj", f"{energy_uj}\n")


times = st.lists(st.floats(0, 10), min_size=1, max_size=30, unique=True).map(sorted)


@given(times, st.floats(-1e5, 1e5))
def test_constant_power_is_power_times_time(at: list[float], power_mw: float) -> None:
    assert integral_mj([(t, power_mw) for t in at], 0, 10) == pytest.approx(10 * power_mw)


@given(times, st.floats(0, 1e4), st.floats(-1e3, 1e3))
def test_power_that_grows_evenly_is_integrated_exactly(at: list[float], start: float, slope: float) -> None:
    at = sorted({0.0, *at, 10.0})
    assert integral_mj([(t, start + slope * t) for t in at], 0, 10) == pytest.approx(10 * start + 50 * slope, abs=1e-6)


@given(times, st.data())
def test_energy_lies_between_the_least_and_the_greatest_power(at: list[float], data: st.DataObject) -> None:
    powers = data.draw(st.lists(st.floats(0, 1e5), min_size=len(at), max_size=len(at)))
    energy_mj = integral_mj(list(zip(at, powers, strict=True)), 0, 10)
    assert energy_mj is not None and 10 * min(powers) - 1e-6 <= energy_mj <= 10 * max(powers) + 1e-6


def test_samples_outside_the_work_do_not_count() -> None:
    assert integral_mj([(0.9, 5000), (2.1, 5000)], 1, 2) is None
    assert integral_mj([(0.9, 5000), (1.5, 100), (2.1, 5000)], 1, 2) == 100


def test_rails_are_sampled_while_the_work_runs(tmp_path: Path) -> None:
    meter = EnergyMeter.of(orin_rails(tmp_path))
    assert meter
    with meter.measuring() as used:
        time.sleep(0.3)
    assert used.samples >= 2 and used.seconds >= 0.3
    assert used.energy_mj == pytest.approx(4915 * used.seconds)


def test_a_change_of_power_in_the_middle_is_seen(tmp_path: Path) -> None:
    meter = EnergyMeter.of(orin_rails(tmp_path))
    assert meter
    with meter.measuring() as used:
        time.sleep(0.3)
        write_rail(tmp_path, 1, "VDD_IN", 5000, 2000)  # 10000 mW
        time.sleep(0.3)
    assert used.energy_mj and 4915 * used.seconds < used.energy_mj < 10000 * used.seconds


def test_work_that_is_over_at_once_has_no_energy(tmp_path: Path) -> None:
    meter = EnergyMeter.of(orin_rails(tmp_path))
    assert meter
    with meter.measuring() as used:
        pass
    assert (used.samples, used.energy_mj) == (0, None)


def test_rails_that_vanish_during_the_work_leave_no_energy(tmp_path: Path) -> None:
    meter = EnergyMeter.of(orin_rails(tmp_path))
    assert meter
    break_reading(tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in1_input")
    with meter.measuring() as used:
        time.sleep(0.1)
    assert used.energy_mj is None and used.seconds >= 0.1


@pytest.mark.parametrize("source", ["rails", "tegrastats"])
def test_work_that_fails_stops_the_sampling(source: str, tmp_path: Path) -> None:
    if source == "rails":
        orin_rails(tmp_path)
    else:
        write_tegrastats(tmp_path, FOREVER)
    meter = EnergyMeter.of(tmp_path)
    assert meter
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), meter.measuring():
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_tegrastats_is_sampled_while_the_work_runs(tmp_path: Path) -> None:
    write_tegrastats(tmp_path, FOREVER)
    meter = EnergyMeter.of(tmp_path)
    assert meter
    with meter.measuring() as used:
        time.sleep(0.5)
    assert used.samples >= 2 and used.energy_mj == pytest.approx(3462 * used.seconds)


@pytest.mark.parametrize("then", ["exit 1", "sleep 60"])
def test_a_tegrastats_that_stops_leaves_no_energy(then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tegrastats(tmp_path, FOREVER)
    meter = EnergyMeter.of(tmp_path)
    assert meter
    monkeypatch.setattr("merino_edge.jetson.device.tegrastats.FIRST_LINE_SECONDS", 0.2)
    write_tegrastats(tmp_path, then)
    with meter.measuring() as used:
        time.sleep(0.1)
    assert (used.samples, used.energy_mj) == (0, None)


# --- RAPL --------------------------------------------------------------------------------------------


def test_rapl_sums_packages_and_leaves_out_what_they_hold(tmp_path: Path) -> None:
    counters = [package(tmp_path, f"intel-rapl:{n}", f"package-{n}", 1_000_000) for n in range(2)]
    package(tmp_path, "intel-rapl:0:0", "core", 500_000)
    package(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    package(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    meter = EnergyMeter.of(tmp_path)
    assert meter and meter.sensors.power_source == "rapl"
    with meter.measuring() as used:
        for counter, energy_uj in zip(counters, (1_250_000, 3_000_000), strict=True):
            counter.write_text(f"{energy_uj}\n")
        for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
            write(tmp_path, f"sys/class/powercap/{other}/energy_uj", 99_000_000)
    assert used.energy_mj == 250 + 2000 and used.samples == 2 and used.seconds > 0


@given(st.integers(0, 999_999), st.integers(0, 999_999))
@settings(deadline=None)  # it writes files
def test_a_counter_that_wraps_goes_on(tmp_path_factory: pytest.TempPathFactory, before: int, spent: int) -> None:
    root = tmp_path_factory.mktemp("rapl")
    counter = package(root, "intel-rapl:0", "package-0", before, span_uj=1_000_000)
    meter = EnergyMeter.of(root)
    assert meter
    with meter.measuring() as used:
        counter.write_text(str((before + spent) % 1_000_000))
    assert used.energy_mj == pytest.approx(spent / 1000)


def test_a_counter_that_is_closed_comes_with_the_command_that_opens_it(tmp_path: Path) -> None:
    counter = package(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter.of(tmp_path)
    assert meter
    break_reading(counter)
    with meter.measuring() as used:
        pass
    assert (used.samples, used.energy_mj) == (0, None)
    assert EnergyMeter.of(tmp_path) is None
    assert Sensors(tmp_path).power_source == (
        f"none: no INA3221 rail in /sys; {counter}: Input/output error; "
        "run: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
    )
