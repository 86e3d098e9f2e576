"""Every recorded line to its numbers; lines rebuilt from random numbers in every format; garbled lines and programs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.recorded_boards import (
    JETPACK4,
    JETPACK5,
    JETPACK5_AGX,
    JETPACK5_ELIDED,
    JETPACK6,
    JETPACK6_AGX,
    JETPACK7,
    LINES,
    write_tegrastats,
)
from merino_edge.jetson.device import tegrastats
from merino_edge.jetson.device.tegrastats import Core, Tegrastats, parse_line

ON_729 = [Core(load, 729) for load in range(100)]
RECORDED = {
    JETPACK4: Tegrastats(
        1504,
        3956,
        None,
        None,
        331,
        4.0,
        (Core(19, 1479), Core(27, 1479), Core(23, 1479), Core(19, 1479)),
        9,
        1600,
        99,
        921,
        {"PLL": 39.5, "CPU": 43.5, "PMIC": 100.0, "GPU": 43.0, "AO": 48.0, "thermal": 43.0},
        {"POM_5V_IN": 4523.0, "POM_5V_GPU": 1113.0, "POM_5V_CPU": 538.0},
    ),
    JETPACK5_ELIDED: Tegrastats(
        3503,
        7337,
        430,
        3668,
        7,
        1.0,
        (ON_729[11], None, None),
        0,
        2133,
        0,
        305,
        {"CV0": 42.718, "CPU": 44.093, "tj": 46.968},
        {"VDD_IN": 4915.0, "VDD_CPU_GPU_CV": 449.0, "VDD_SOC": 1431.0},
    ),
    JETPACK5: Tegrastats(
        3503,
        7337,
        430,
        3668,
        7,
        1.0,
        (ON_729[11], ON_729[13], ON_729[9], ON_729[18], None, None),
        0,
        2133,
        0,
        305,
        {
            "CV0": 42.718,
            "CPU": 44.093,
            "SOC2": 42.625,
            "SOC0": 43.281,
            "CV1": 42.25,
            "GPU": 41.343,
            "tj": 46.968,
            "SOC1": 46.968,
            "CV2": 42.875,
        },
        {"VDD_IN": 4915.0, "VDD_CPU_GPU_CV": 449.0, "VDD_SOC": 1431.0},
    ),
    JETPACK5_AGX: Tegrastats(
        1205,
        30623,
        0,
        15311,
        6429,
        4.0,
        tuple(Core(int(n == 2), 730 if n in (5, 6) else 729) for n in range(12)),
        0,
        204,
        0,
        114,
        {"CPU": 43.5, "Tdiode": 32.5, "SOC2": 40.062, "SOC0": 40.5, "GPU": 38.156, "SOC1": 39.125},
        {"VDD_GPU_SOC": 4788.0, "VDD_CPU_CV": 798.0, "VIN_SYS_5V0": 3842.0, "VDDQ_VDD2_1V8AO": 707.0},
    ),
    JETPACK6: Tegrastats(
        2639,
        7620,
        0,
        3810,
        9,
        4.0,
        tuple(ON_729[load] for load in (1, 4, 8, 4, 5, 4)),
        None,
        None,
        0,
        None,
        {"cpu": 44.156, "soc2": 43.781, "soc0": 44.687, "gpu": 45.968, "tj": 45.968, "soc1": 45.312},
        {"VDD_IN": 5263.0, "VDD_CPU_GPU_CV": 717.0, "VDD_SOC": 1794.0},
    ),
    JETPACK6_AGX: Tegrastats(
        10239,
        62841,
        1,
        31421,
        442,
        4.0,
        (*[Core(0, 1728)] * 4, *[Core(0, 1420)] * 4, None, None, None, None),
        None,
        None,
        0,
        None,
        {"cpu": 37.5, "tboard": 27.0, "soc2": 34.562, "tdiode": 27.5, "soc0": 34.531, "tj": 37.5, "soc1": 33.656},
        {"VDD_GPU_SOC": 1592.0, "VDD_CPU_CV": -398.0, "VIN_SYS_5V0": 2624.0, "VDDQ_VDD2_1V8AO": 403.0},
    ),
    JETPACK7: Tegrastats(
        2840,
        7486,
        None,
        None,
        33,
        4.0,
        tuple(ON_729[load] for load in (3, 0, 1, 0, 0, 0)),
        3,
        665,
        0,
        305,
        {"cpu": 45.687, "soc2": 44.687, "soc0": 46.093, "gpu": 46.781, "tj": 46.781, "soc1": 46.25},
        {"VDD_IN": 3462.0, "VDD_CPU_GPU_CV": 442.0, "VDD_SOC": 1127.0},
    ),
}


def test_every_recorded_line_has_its_numbers() -> None:
    assert set(RECORDED) == set(LINES)
    for line, numbers in RECORDED.items():
        assert parse_line(line) == numbers
    assert parse_line(JETPACK6_AGX).cpu_mhz == 1728 and parse_line("").cpu_mhz is None


def test_free_blocks_are_counted_in_mb_whatever_their_unit() -> None:
    for text, size_mb in (("(lfb 3x512kB)", 0.5), ("(lfb 3x4MB)", 4.0)):
        stats = parse_line(f"RAM 1504/3956MB {text} IRAM 0/252kB(lfb 252kB)")
        assert (stats.free_blocks, stats.free_block_mb) == (3, size_mb)


# --- rebuilt lines -----------------------------------------------------------------------------------

count = st.integers(0, 999_999)
mhz = st.integers(1, 4000)
percent = st.integers(0, 100)
cores = st.lists(st.none() | st.builds(Core, percent, mhz), min_size=1, max_size=14).map(tuple)
milli_celsius = st.integers(-40_000, 120_000).filter(bool)
prefix = st.sampled_from(("VDD_", "VIN_", "POM_"))
rail = st.tuples(prefix, st.text("ABCPUV0159_", min_size=1, max_size=12)).map("".join)
rails = st.dictionaries(rail, count, min_size=1, max_size=6)


def cpu_text(all_cores: tuple[Core | None, ...]) -> str:
    return ",".join("off" if core is None else f"{core.load_percent}%@{core.clock_mhz}" for core in all_cores)


@st.composite
def stats(draw: st.DrawFn, *, swap: bool, gpu_clock: bool, emc: bool, zones: tuple[str, ...]) -> Tegrastats:
    """What a line of a format can say."""
    temperatures = {zone: draw(milli_celsius) / 1000 for zone in zones}
    return Tegrastats(
        draw(count),
        draw(count),
        draw(count) if swap else None,
        draw(count) if swap else None,
        draw(count),
        float(draw(count)),
        draw(cores),
        draw(percent) if emc else None,
        draw(mhz) if emc else None,
        draw(percent),
        draw(mhz) if gpu_clock else None,
        temperatures,
        {name: float(value) for name, value in draw(rails).items()},
    )


def zones_text(s: Tegrastats, more: str = "") -> str:
    return " ".join(f"{zone}@{value:g}C{more}" for zone, value in s.temperature_c.items())


def rails_text(s: Tegrastats, unit: str, *more: int) -> str:
    return " ".join(
        "/".join(f"{value}{unit}" for value in (int(power), *more)).join((f"{name} ", ""))
        for name, power in s.power_mw.items()
    )


@given(stats(swap=False, gpu_clock=True, emc=True, zones=("PLL", "CPU", "GPU", "AO", "thermal")), count)
def test_lines_of_jetpack_4(s: Tegrastats, average: int) -> None:
    assert s == parse_line(
        f"RAM {s.ram_used_mb}/{s.ram_total_mb}MB (lfb {s.free_blocks}x{s.free_block_mb:.0f}MB) IRAM 0/252kB(lfb 252kB) "
        f"CPU [{cpu_text(s.cores)}] EMC_FREQ {s.emc_percent}%@{s.emc_mhz} GR3D_FREQ {s.gpu_percent}%@{s.gpu_mhz} "
        f"NVDEC 716 VIC_FREQ 0%@140 APE 25 {zones_text(s)} {rails_text(s, '', average)}"
    )


@given(stats(swap=True, gpu_clock=True, emc=True, zones=("CV0", "CPU", "SOC2", "GPU", "tj")), count)
def test_lines_of_jetpack_5(s: Tegrastats, average: int) -> None:
    assert s == parse_line(
        f"01-24-2024 09:17:09 RAM {s.ram_used_mb}/{s.ram_total_mb}MB (lfb {s.free_blocks}x{s.free_block_mb:.0f}MB) "
        f"SWAP {s.swap_used_mb}/{s.swap_total_mb}MB (cached 1MB) CPU [{cpu_text(s.cores)}] "
        f"EMC_FREQ {s.emc_percent}%@{s.emc_mhz} GR3D_FREQ {s.gpu_percent}%@{s.gpu_mhz} GR3D2_FREQ 0%@0 VIC_FREQ 115 "
        f"APE 174 {zones_text(s)} CV1@-256C {rails_text(s, 'mW', average)} NC 0mW/0mW"
    )


@given(stats(swap=True, gpu_clock=False, emc=False, zones=("cpu", "soc2", "gpu", "tj")), count)
def test_lines_of_jetpack_6(s: Tegrastats, average: int) -> None:
    assert s == parse_line(
        f"05-05-2025 06:05:39 RAM {s.ram_used_mb}/{s.ram_total_mb}MB (lfb {s.free_blocks}x{s.free_block_mb:.0f}MB) "
        f"SWAP {s.swap_used_mb}/{s.swap_total_mb}MB (cached 0MB) CPU [{cpu_text(s.cores)}] GR3D_FREQ {s.gpu_percent}% "
        f"{zones_text(s)} {rails_text(s, 'mW', average)}"
    )


@given(stats(swap=False, gpu_clock=True, emc=True, zones=("cpu", "soc2", "gpu", "tj")), count, count, st.integers(0, 1))
def test_lines_of_jetpack_7(s: Tegrastats, average: int, highest: int, second_gpc: int) -> None:
    clocks = f"[{s.gpu_mhz}{',0' * second_gpc}]"
    assert s == parse_line(
        f"09-19-2026 13:33:04 RAM {s.ram_used_mb}/{s.ram_total_mb}MB (lfb {s.free_blocks}x{s.free_block_mb:.0f}MB) "
        f"CPU [{cpu_text(s.cores)}] EMC_FREQ {s.emc_percent}%@{s.emc_mhz} GR3D_FREQ {s.gpu_percent}%@{clocks} "
        f"NVDEC0 off VIC off APE 200 {zones_text(s, '/45.812C')} {rails_text(s, 'mW', average, highest)}"
    )


# --- garbled lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_a_line_cut_anywhere_says_nothing_that_the_whole_does_not(line: str) -> None:
    whole = parse_line(line)
    for end in range(len(line)):
        cut = parse_line(line[:end])
        assert cut.power_mw.items() <= whole.power_mw.items()
        assert cut.ram_total_mb in (None, whole.ram_total_mb) and cut.cores in ((), whole.cores)
        assert cut.swap_total_mb in (None, whole.swap_total_mb) and cut.free_block_mb in (None, whole.free_block_mb)


@given(st.text(max_size=200) | st.sampled_from(LINES).flatmap(lambda line: st.permutations(line.split()).map(" ".join)))
def test_nothing_raises(line: str) -> None:
    assert isinstance(parse_line(line), Tegrastats)


def test_numbers_without_end_are_no_numbers() -> None:
    digits = "9" * 5000
    assert parse_line(f"RAM {digits}/{digits}MB VDD_IN {digits}mW/1mW cpu@{digits}C CPU [{digits}%@1]") == Tegrastats()


# --- the program -------------------------------------------------------------------------------------


def first_reading(root: Path) -> Tegrastats:
    return tegrastats.read_once(root / tegrastats.PROGRAM)


def test_the_program_is_read_and_ended(tmp_path: Path) -> None:
    write_tegrastats(tmp_path, f"echo $$ > {tmp_path}/pid; echo '{JETPACK7}'; sleep 600; true")
    assert first_reading(tmp_path) == RECORDED[JETPACK7]
    group = int((tmp_path / "pid").read_text())
    for _ in range(1000):  # the kernel may take a moment to end what was killed
        if not running(group):
            break
        time.sleep(0.01)
    assert not running(group)


def running(group: int) -> bool:
    """Whether a process of the group lives; one that is dead but not yet collected does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("sleep 60", "tegrastats printed nothing within 0.2 s"),
        ("printf 'RAM 1504/'; sleep 60", "tegrastats printed nothing within 0.2 s"),
        ("exit 1", "tegrastats ended without a line"),
        ("head -c 1000000 /dev/zero; sleep 60", "tegrastats ended without a line"),
    ],
)
def test_a_program_that_says_nothing_is_a_reason_in_one_line(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "0.2 s" in says:
        monkeypatch.setattr(tegrastats, "FIRST_LINE_SECONDS", 0.2)
    write_tegrastats(tmp_path, script)
    with pytest.raises(OSError, match=says):
        first_reading(tmp_path)


def test_a_program_that_cannot_run_is_a_reason_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="tegrastats cannot be run \\(No such file or directory\\)"):
        first_reading(tmp_path)
    write_tegrastats(tmp_path, "echo")
    (tmp_path / tegrastats.PROGRAM).write_bytes(b"\x7fELF")
    with pytest.raises(OSError, match="tegrastats cannot be run \\(Exec format error\\)"):
        first_reading(tmp_path)
