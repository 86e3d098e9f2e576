"""Each check on trees where it must find something and on trees where it must not."""

from __future__ import annotations

import grp
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.recorded_boards import BOARDS, board_files, expand, write
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.doctor.checks import CHECKS, check_engine, run_checks
from merino_edge.jetson.doctor.environment import Environment

NANO_SUPER = "jetpack7-orin-nano-super"
STATUS, L4T, LIMIT = "var/lib/nvpmodel/status", "etc/nv_tegra_release", "sys/class/devfreq/17000000.gpu/max_freq"
DPKG = "var/lib/dpkg/status"
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
DISK_SWAP = SWAPS + "/swapfile                               file\t\t8388604\t\t0\t\t-2\n"
ZRAM_SWAP = SWAPS + "/dev/zram0                              partition\t635008\t\t0\t\t5\n"
NEWER_RUNTIME = "1.25.0"


def environment_of(root: Path) -> Environment:
    """The tree's environment under a Python that itself gives no reason to complain."""
    return replace(Environment.of(root), onnxruntime=NEWER_RUNTIME)


def fired(root: Path) -> dict[str, str]:
    return {finding["name"]: finding["found"] for finding in run_checks(environment_of(root))}


def healthy(root: Path) -> Path:
    """An Orin Nano Super at its full power mode, with swap on a disk."""
    expand(NANO_SUPER, root)
    write(root, STATUS, "pmode:0002 fmode:quiet\n")
    write(root, LIMIT, "1020000000\n")
    write(root, "proc/swaps", DISK_SWAP)
    write(root, "dev/nvmap", "")
    return root


def other_conf(root: Path, board: str) -> None:
    write(root, "etc/nvpmodel.conf", board_files(board)["etc/nvpmodel.conf"])


def version_7_2_0(root: Path) -> None:
    write(root, L4T, "# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64\n")


def without_super(root: Path) -> None:
    version_7_2_0(root)
    other_conf(root, "jetpack5-orin-nano")
    write(root, STATUS, "pmode:0000 fmode:quiet\n")
    write(root, LIMIT, "624750000\n")


def capped_super(root: Path) -> None:
    version_7_2_0(root)
    write(root, LIMIT, "624750000\n")


def container(root: Path) -> None:
    write(root, ".dockerenv", "")
    (root / L4T).unlink()


def blind_container(root: Path) -> None:
    container(root)
    shutil.rmtree(root / "proc/device-tree")
    shutil.rmtree(root / "var/lib/nvpmodel")


def container_without_status(root: Path) -> None:
    """As one that mounts nvpmodel.conf, but not the current mode."""
    write(root, ".dockerenv", "")
    shutil.rmtree(root / "var/lib/nvpmodel")
    (root / "var/lib/nvpmodel").mkdir()


def container_without_gpu(root: Path) -> None:
    write(root, ".dockerenv", "")
    (root / "dev/nvmap").unlink()


def throttled(root: Path) -> None:
    for name, count in (("oc1", 0), ("oc2", 4), ("oc3", 1)):
        write(root, f"sys/devices/platform/soctherm-oc-event/hwmon/hwmon1/{name}_event_cnt", f"{count}\n")


def set_mode(number: int, limit_hz: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        write(root, STATUS, f"pmode:{number:04} fmode:quiet\n")
        write(root, LIMIT, f"{limit_hz}\n")

    return change


def nx_25w(root: Path) -> None:
    for path in ("proc/device-tree/compatible", "etc/nvpmodel.conf", STATUS, LIMIT):
        write(root, path, board_files("jetpack6-orin-nx-16gb")[path])


def nx_15w(root: Path) -> None:
    nx_25w(root)
    set_mode(2, 612_000_000)(root)


def file(path: str, text: str) -> Callable[[Path], None]:
    return lambda root: write(root, path, text) and None


@pytest.mark.parametrize(
    ("change", "name", "found"),
    [
        (
            file(L4T, "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64\n"),
            "large allocations fail",
            "L4T 36.4.7",
        ),
        (without_super, "GPU capped by JetPack 7.2.0", "L4T 39.2.0: power modes 15W, 7W only; GPU limit 624.75 MHz"),
        (capped_super, "GPU capped by JetPack 7.2.0", "L4T 39.2.0: GPU limit 624.75 MHz"),
        (
            set_mode(1, 1_020_000_000),
            "power mode not applied",
            "25W means a GPU limit of 918 MHz, the GPU's limit is 1020 MHz",
        ),
        (
            set_mode(1, 918_000_000),
            "power mode holds the GPU back",
            "power mode 25W caps the GPU at 918 MHz (MAXN_SUPER, nvpmodel -m 2: no cap)",
        ),
        (
            nx_25w,
            "power mode holds the GPU back",
            "power mode 25W caps the GPU at 408 MHz "
            "(MAXN, nvpmodel -m 0: no cap; even 10W: 612 MHz; even 15W: 612 MHz)",
        ),
        (
            nx_15w,
            "power mode holds the GPU back",
            "power mode 15W switches off 4 SMs that MAXN (nvpmodel -m 0) has on and caps the GPU at 612 MHz "
            "(MAXN, nvpmodel -m 0: no cap)",
        ),
        (
            file(DPKG, "Package: libnvinfer8\nStatus: install ok installed\nVersion: 8.6.2.3-1+cuda12.2\n"),
            "TensorRT too old",
            "TensorRT 8.6.2.3-1+cuda12.2",
        ),
        (file("proc/swaps", SWAPS), "no swap for builds", "7.3 GiB of memory, no swap on a disk"),
        (file("proc/swaps", DISK_SWAP + ZRAM_SWAP.splitlines()[1]), "swap takes memory", "swap in memory (/dev/zram)"),
        (file("tmp/.X11-unix/X0", ""), "desktop takes memory", "a graphical session runs"),
        (file("run/user/1000/wayland-0", ""), "desktop takes memory", "a graphical session runs"),
        (container, "container hides the board", "this container does not see /etc/nv_tegra_release"),
        (container_without_status, "container hides the board", "this container does not see /var/lib/nvpmodel"),
        (container_without_gpu, "container without the GPU", "this container has no device of the GPU"),
        (
            throttled,
            "the board throttles",
            "since the start, average over-current 4 times, instantaneous over-current 1 times",
        ),
    ],
)
def test_a_check_fires_where_it_must_and_alone(
    change: Callable[[Path], None], name: str, found: str, tmp_path: Path
) -> None:
    healthy(tmp_path)
    assert fired(tmp_path) == {}
    change(tmp_path)
    findings = fired(tmp_path)
    assert findings.pop(name) == found
    # a GPU that stays capped also shows as a mode that is not applied; nothing else may come along
    assert set(findings) <= ({"power mode holds the GPU back"} if name == "power mode not applied" else set())


def test_a_container_without_device_tree_is_known_by_the_kernel(tmp_path: Path) -> None:
    blind_container(healthy(tmp_path))
    assert fired(tmp_path) == {
        "container hides the board": "this container does not see /proc/device-tree and /etc/nv_tegra_release "
        "and /var/lib/nvpmodel"
    }
    write(tmp_path, "proc/sys/kernel/osrelease", "6.8.0-45-generic\n")  # a container on some other machine
    assert fired(tmp_path) == {}


def test_swap_in_memory_is_no_swap_for_builds(tmp_path: Path) -> None:
    write(healthy(tmp_path), "proc/swaps", ZRAM_SWAP)
    assert set(fired(tmp_path)) == {"no swap for builds", "swap takes memory"}
    (tmp_path / "proc/swaps").unlink()
    assert set(fired(tmp_path)) == {"no swap for builds"}  # SwapTotal is 0
    write(tmp_path, "proc/meminfo", "MemTotal: 7665664 kB\nSwapTotal: 8388604 kB\n")
    assert fired(tmp_path) == {}  # some swap, and no telling where
    write(tmp_path, "proc/meminfo", "MemTotal: 16000000 kB\nSwapTotal: 0 kB\n")
    assert fired(tmp_path) == {}


def test_the_fixed_releases_are_left_alone(tmp_path: Path) -> None:
    healthy(tmp_path)
    for revision in (
        "# R36 (release), REVISION: 4.4,",
        "# R36 (release), REVISION: 5.0,",
        "# R35 (release), REVISION: 4.7,",
    ):
        write(tmp_path, L4T, revision)
        assert fired(tmp_path) == {}
    version_7_2_0(tmp_path)  # with the Super modes and the full clock
    assert fired(tmp_path) == {}
    set_mode(0, 612_000_000)(tmp_path)  # 15W is below the cap by itself
    assert set(fired(tmp_path)) == {"power mode holds the GPU back"}


def test_the_package_tells_l4t_where_the_release_file_is_not_seen(tmp_path: Path) -> None:
    healthy(tmp_path)
    (tmp_path / L4T).unlink()
    write(tmp_path, DPKG, "Package: nvidia-l4t-core\nStatus: install ok installed\nVersion: 36.4.7-20250918154033\n")
    assert fired(tmp_path) == {"large allocations fail": "L4T 36.4.7"}


@pytest.mark.parametrize(
    ("version", "fires"), [(None, False), ("1.22.1", True), ("1.9.0", True), ("1.23.0", False), ("2.0", False)]
)
def test_an_onnx_runtime_that_runs_no_bundle_is_named(version: str | None, fires: bool, tmp_path: Path) -> None:
    findings = run_checks(replace(Environment.of(tmp_path), onnxruntime=version))
    assert [finding["found"] for finding in findings] == ([f"ONNX Runtime {version}"] if fires else [])


def test_bindings_that_only_the_system_s_python_sees_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/python3.12/dist-packages/tensorrt"
    folder.mkdir(parents=True)
    environment = replace(environment_of(tmp_path), tensorrt_importable=False, python="3.12")
    assert [finding["found"] for finding in run_checks(environment)] == [
        f"TensorRT's bindings are in {folder}, this Python 3.12 does not see them"
    ]
    assert run_checks(replace(environment, tensorrt_importable=True)) == []
    assert run_checks(replace(environment, system_tensorrt=())) == []


def test_closed_device_nodes_are_named_with_their_group(tmp_path: Path) -> None:
    environment = environment_of(healthy(tmp_path))
    nodes = ("/dev/nvhost-ctrl-gpu (group video)", "/dev/nvmap (group video)", "/dev/dri/renderD128 (group render)")
    assert [finding["found"] for finding in run_checks(replace(environment, closed_nodes=nodes))] == [
        "this user may not open /dev/nvhost-ctrl-gpu (group video), /dev/nvmap (group video) and 1 more"
    ]
    other = replace(environment, card=device_card(tmp_path / "nothing"), closed_nodes=nodes)  # no Jetson
    assert run_checks(other) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another group")
def test_nodes_are_closed_to_who_is_in_no_group_of_theirs(tmp_path: Path) -> None:
    video = grp.getgrnam("video").gr_gid
    for name, mode, group in (("nvhost-ctrl-gpu", 0o660, video), ("nvmap", 0o666, video), ("nvhost-dbg-gpu", 0o660, 0)):
        node = write(tmp_path, f"dev/{name}", "")
        node.chmod(mode)
        os.chown(node, 0, group)
    assert Environment.of(tmp_path, uid=1000, groups={1000}).closed_nodes == ("/dev/nvhost-ctrl-gpu (group video)",)
    assert Environment.of(tmp_path, uid=1000, groups={1000, video}).closed_nodes == ()
    assert Environment.of(tmp_path, uid=0, groups={0}).closed_nodes == ()


def test_every_check_names_a_cure_and_a_source_in_a_line() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.advice and check.source and not {"\n"} & {*check.name, *check.advice, *check.source}


@pytest.mark.parametrize("board", BOARDS)
def test_recorded_boards_show_what_is_known_of_them(board: str, tmp_path: Path) -> None:
    expected = {
        "jetpack6-orin-nx-16gb": {"power mode holds the GPU back"},
        NANO_SUPER: {"power mode holds the GPU back", "no swap for builds"},
    }
    assert set(fired(expand(board, tmp_path))) == expected.get(board, set())


@pytest.mark.parametrize("path", sorted(board_files(NANO_SUPER)))
def test_a_garbled_file_never_breaks_the_doctor(path: str, tmp_path: Path) -> None:
    healthy(tmp_path)
    for data in (b"", b"\xff\x00{[:\n\n", b"9" * 5000):
        (tmp_path / path).write_bytes(data)
        assert all("\n" not in found for found in fired(tmp_path).values())


def test_an_engine_from_another_machine_or_mode_is_named(tmp_path: Path) -> None:
    built_on = device_card(healthy(tmp_path))
    assert check_engine(built_on, device_card(tmp_path)) == []
    write(tmp_path, STATUS, "pmode:0002 fmode:cool\n")  # the fan is no matter
    assert check_engine(built_on, device_card(tmp_path)) == []
    write(tmp_path, STATUS, "pmode:0001 fmode:cool\n")
    write(tmp_path, "sys/devices/platform/gpu.0/tpc_pg_mask", "252\n")
    (finding,) = check_engine(built_on, device_card(tmp_path))
    assert finding["found"] == (
        "engine built on SMs 8, here 4; power mode pmode:0002 (MAXN_SUPER), here pmode:0001 (25W)"
    )
    (finding,) = check_engine(built_on, device_card(tmp_path / "nothing"))
    assert "TensorRT 10.16.2.10-1+cuda13.2, here unknown; L4T 39.2.1, here unknown" in finding["found"]
    for damaged in (None, "a board", [1], {**built_on, "gpu": "large"}):
        (finding,) = check_engine(damaged, device_card(tmp_path))
        assert "\n" not in finding["found"] and "SMs None, here 4" in finding["found"]
