"""Sensors over recorded trees, real programs in tegrastats' place, and files that fail while being read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.recorded_boards import (
    BOARDS,
    JETPACK5_AGX,
    JETPACK7,
    board_files,
    break_reading,
    expand,
    orin_rails,
    write,
    write_rail,
    write_tegrastats,
)
from merino_edge.jetson.device.energy import EnergyMeter
from merino_edge.jetson.device.rails import total_mw
from merino_edge.jetson.device.sensors import Reading, Sensors, moved

AGX_RAILS = {"VDD_GPU_SOC": 4788, "VDD_CPU_CV": 798, "VIN_SYS_5V0": 3842, "VDDQ_VDD2_1V8AO": 707}


# --- power -------------------------------------------------------------------------------------------


def test_rails_are_found_by_label_and_shunt_sums_are_none(tmp_path: Path) -> None:
    orin_rails(tmp_path)
    write(tmp_path, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in7_label", "sum of shunt voltages\n")
    write(tmp_path, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in7_input", "12\n")
    write_rail(tmp_path, 1, "NC", 0, 0, bus="1-0041")
    sensors = Sensors(tmp_path)
    reading = sensors.read()
    assert sensors.power_source == "ina3221 sysfs" and reading.total_mw == 4915
    assert reading.power_mw == {"VDD_IN": 4915.0, "VDD_CPU_GPU_CV": 450.0, "VDD_SOC": pytest.approx(1432.13)}


def test_rails_of_jetpack_4_are_read_through_iio(tmp_path: Path) -> None:
    sensors = Sensors(expand("jetpack4-nano", tmp_path))
    assert sensors.power_source == "ina3221 sysfs"
    assert sensors.read().power_mw == {"POM_5V_IN": 4523.0, "POM_5V_GPU": 1113.0, "POM_5V_CPU": 538.0}
    assert sensors.read().total_mw == 4523


def test_an_agx_orin_s_rails_on_two_monitors_are_summed(tmp_path: Path) -> None:
    for channel, (name, power_mw) in enumerate(AGX_RAILS.items()):
        bus, channel_there = ("1-0040", channel + 1) if channel < 3 else ("1-0041", 2)
        write_rail(tmp_path, channel_there, name, 1000, power_mw, bus=bus)
    assert Sensors(tmp_path).read().total_mw == 10135
    (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon3/curr2_input").unlink()
    sensors = Sensors(tmp_path)
    assert sensors.read().total_mw is None and len(sensors.read().power_mw) == 3
    assert sensors.power_source.startswith(
        "none: no sum can be read, or none is documented, for the rails VDD_GPU_SOC, VDD_CPU_CV"
    )


def test_thor_s_rails_are_read_but_no_sum_is_guessed(tmp_path: Path) -> None:
    write_rail(expand("jetpack7-thor", tmp_path), 1, "VDD_GPU", 5000, 100, bus="2-0040")
    sensors = Sensors(tmp_path)
    assert sensors.read().power_mw == {"VDD_GPU": 500.0} and sensors.power_source.startswith("none: no sum")
    assert EnergyMeter.of(tmp_path) is None


@pytest.mark.parametrize("broken", ["in1_input", "curr1_input"])
def test_a_rail_that_fails_is_absent_and_the_reason_is_said(broken: str, tmp_path: Path) -> None:
    file = orin_rails(tmp_path) / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3" / broken
    sensors = Sensors(tmp_path)
    break_reading(file)
    assert set(sensors.read().power_mw) == {"VDD_CPU_GPU_CV", "VDD_SOC"}  # it went bad after it was found
    assert Sensors(tmp_path).power_source.startswith(f"none: {file}: Input/output error")
    file.unlink()
    file.symlink_to("gone")
    assert set(sensors.read().power_mw) == {"VDD_CPU_GPU_CV", "VDD_SOC"}
    assert Sensors(tmp_path).power_source.startswith(f"none: {file}: No such file or directory")
    assert EnergyMeter.of(tmp_path) is None


def test_tegrastats_stands_in_where_sysfs_shows_no_rails(tmp_path: Path) -> None:
    write_tegrastats(tmp_path, f"echo '{JETPACK7}'; sleep 60")
    sensors = Sensors(tmp_path)
    reading = sensors.read()
    assert sensors.power_source == "tegrastats"
    assert reading.power_mw == {"VDD_IN": 3462.0, "VDD_CPU_GPU_CV": 442.0, "VDD_SOC": 1127.0}
    assert reading.clock_mhz == {"cpu": 729, "gpu": 305, "emc": 665}
    assert reading.temperature_c["tj"] == 46.781
    write_tegrastats(tmp_path, f"echo '{JETPACK5_AGX}'; sleep 60")
    assert Sensors(tmp_path).read().total_mw == 10135


def test_what_sysfs_says_goes_before_tegrastats(tmp_path: Path) -> None:
    expand("jetpack7-orin-nano-super", tmp_path)
    write_tegrastats(tmp_path, f"echo '{JETPACK7}'; sleep 60")
    reading = Sensors(tmp_path).read()
    assert reading.clock_mhz == {"cpu": 960.0, "gpu": 306.0, "emc": 665.6} and reading.total_mw == 3462
    orin_rails(tmp_path)
    assert Sensors(tmp_path).power_source == "ina3221 sysfs"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 1", "tegrastats ended without a line"),
        (
            "echo 'RAM 1/2MB VDD_SOC 3mW/3mW'",
            "tegrastats shows no rails of a known sum (rails shown: VDD_SOC; root may see more)",
        ),
        (
            "echo 'so much noise \x01 VDD_IN'",
            "tegrastats shows no rails of a known sum (rails shown: none; root may see more)",
        ),
        ("sleep 60", "tegrastats printed nothing within 0.2 s"),
    ],
)
def test_a_tegrastats_of_no_use_is_named(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "0.2 s" in says:
        monkeypatch.setattr("merino_edge.jetson.device.tegrastats.FIRST_LINE_SECONDS", 0.2)
    write_tegrastats(tmp_path, script)
    sensors = Sensors(tmp_path)
    assert sensors.power_source == f"none: no INA3221 rail in /sys; {says}; no RAPL counter in /sys/class/powercap"
    assert sensors.read().power_mw == {} and EnergyMeter.of(tmp_path) is None and "\n" not in sensors.power_source


def test_a_machine_without_anything_says_so(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    assert sensors.power_source == "none: no INA3221 rail in /sys; no RAPL counter in /sys/class/powercap"
    assert sensors.read() == Reading({}, {}, {}, {}, "unknown")


def test_totals_need_every_rail() -> None:
    assert total_mw({}) is None and total_mw({"VDD_SOC": 1}) is None
    assert total_mw({"VDD_IN": 5, "VDD_SOC": 1}) == 5 and total_mw({"POM_5V_IN": 7, "POM_5V_GPU": 1}) == 7
    assert total_mw(AGX_RAILS) == 10135
    for name in AGX_RAILS:
        assert total_mw({other: 1 for other in AGX_RAILS if other != name}) is None


# --- clocks, temperatures, counters --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "mhz"),
    [
        ("sys/class/devfreq/17000000.gpu/cur_freq", "gpu", 306.0),
        ("sys/class/devfreq/17000000.ga10b/cur_freq", "gpu", 306.0),
        ("sys/class/devfreq/17000000.gv11b/cur_freq", "gpu", 306.0),
        ("sys/class/devfreq/57000000.gpu/cur_freq", "gpu", 306.0),
        ("sys/class/devfreq/gpu-gpc-0/cur_freq", "gpu", 306.0),
        ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "emc", 306.0),
        ("sys/class/devfreq/bwmgr/cur_freq", "emc", 306.0),
    ],
)
def test_clocks_stand_where_each_board_keeps_them(path: str, name: str, mhz: float, tmp_path: Path) -> None:
    file = write(tmp_path, path, "306000000\n")
    assert Sensors(tmp_path).read().clock_mhz == {name: mhz}
    break_reading(file)
    assert Sensors(tmp_path).read().clock_mhz == {}
    file.unlink()
    file.write_text("off\n")
    assert Sensors(tmp_path).read().clock_mhz == {}


def test_the_cpu_s_clock_is_the_fastest_core_s(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor : 0\ncpu MHz\t\t: 800.5\n\nprocessor : 1\ncpu MHz\t\t: 2596.096\n")
    assert Sensors(tmp_path).read().clock_mhz == {"cpu": 2596.096}
    for core, khz in enumerate((729600, 1728000, 115200)):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", khz)
    assert Sensors(tmp_path).read().clock_mhz == {"cpu": 1728.0}


def test_zones_that_are_off_or_fail_are_left_out(tmp_path: Path) -> None:
    expand("jetpack7-orin-nano-super", tmp_path)
    write(tmp_path, "sys/class/thermal/thermal_zone4/type", "cv1-thermal\n")
    break_reading(tmp_path / "sys/class/thermal/thermal_zone4/temp")
    write(tmp_path, "sys/class/thermal/thermal_zone5/type", "cv2-thermal\n")
    write(tmp_path, "sys/class/thermal/thermal_zone5/temp", "-256000\n")
    for zone, milli in ((6, 30000), (7, 35000)):  # two of one type: the hotter
        write(tmp_path, f"sys/class/thermal/thermal_zone{zone}/type", "acpitz\n")
        write(tmp_path, f"sys/class/thermal/thermal_zone{zone}/temp", milli)
    assert Sensors(tmp_path).read().temperature_c == {
        "cpu-thermal": 45.687,
        "gpu-thermal": 46.781,
        "tj-thermal": 46.781,
        "acpitz": 35.0,
    }


def test_throttling_is_counted(tmp_path: Path) -> None:
    folder = "sys/devices/platform/soctherm-oc-event/hwmon/hwmon5"
    for name, count in (("oc1", 0), ("oc2", 15), ("oc3", 37)):
        write(tmp_path, f"{folder}/{name}_event_cnt", f"{count}\n")
        write(tmp_path, f"{folder}/{name}_throt_en", "1\n")
    assert Sensors(tmp_path).read().throttle_events == {"oc1": 0, "oc2": 15, "oc3": 37}
    for core in range(2):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", 4)
    break_reading(tmp_path / folder / "oc1_event_cnt")
    assert Sensors(tmp_path).read().throttle_events == {"oc2": 15, "oc3": 37, "cpu core": 8}


@pytest.mark.parametrize("board", BOARDS)
def test_any_file_may_be_garbled(board: str, tmp_path: Path) -> None:
    expand(board, tmp_path)
    for path, text in board_files(board).items():
        for data in (b"", b"\xff\x00\n", b"9" * 5000, b"nan\n", b"1e999"):
            (tmp_path / path).write_bytes(data)
            sensors = Sensors(tmp_path)
            assert isinstance(sensors.read(), Reading) and "\n" not in sensors.power_source
        write(tmp_path, path, text)


# --- what moved --------------------------------------------------------------------------------------

STILL = Reading({"VDD_IN": 4915}, {"tj": 46.0}, {"cpu": 1344.0, "gpu": 918.0}, {"oc3": 7}, "pmode:0001 (25W)")


def test_what_moved_is_said_in_lines() -> None:
    assert moved(STILL, replace(STILL, power_mw={"VDD_IN": 9000}, temperature_c={"tj": 80.0})) == []
    after = Reading({}, {}, {"cpu": 1344.0, "gpu": 612.0, "emc": 2133.0}, {"oc3": 9, "oc1": 5}, "pmode:0000 (15W)")
    assert moved(STILL, after) == [
        "gpu clock moved from 918 to 612 MHz",
        "oc3 throttled 2 times",
        "power mode changed from pmode:0001 (25W) to pmode:0000 (15W)",
    ]
    assert moved(STILL, Reading({}, {}, {}, {}, STILL.power_mode)) == []  # what is not read did not move


@given(st.floats(1, 5000), st.floats(-0.2, 0.2).filter(lambda change: abs(abs(change) - 0.05) > 1e-9))
def test_a_clock_moved_by_more_than_five_percent(mhz: float, change: float) -> None:
    before, after = (replace(STILL, clock_mhz={"gpu": clock}) for clock in (mhz, mhz * (1 + change)))
    assert bool(moved(before, after)) == (abs(change) > 0.05)
