"""The boards' data against the figures that their sources print."""

from __future__ import annotations

import pytest

from merino_edge.errors import InputError
from merino_edge.jetson.estimate.boards import BOARDS, Board, board
from merino_edge.jetson.estimate.roofline import DRAM_EFFICIENCY, PEAK_EFFICIENCY

# Dense FP16 TFLOPS of every power mode, and GB/s of the memory as marketed or measured by its clock.
TFLOPS = {
    "nano": {"MAXN": 0.47, "5W": 0.33},
    "xavier-nx": {"max": 6.8},
    "orin-nano-4gb": {"10W-nosuper": 5.1, "7W_AI": 3.3, "7W_CPU": 2.5, "10W": 5.0, "25W": 8.4, "MAXN_SUPER": 8.4},
    "orin-nano-8gb": {"15W-nosuper": 10.2, "7W": 3.3, "15W": 10.0, "25W": 15.0, "MAXN_SUPER": 16.7},
    "orin-nx-8gb": {"MAXN": 12.5, "10W": 5.0, "15W": 5.0, "20W": 6.7, "40W": 19.2, "MAXN_SUPER": 19.2},
    "orin-nx-16gb": {"MAXN": 15.0, "10W": 5.0, "15W": 5.0, "25W": 6.7, "40W": 19.2, "MAXN_SUPER": 19.2},
    "agx-orin-32gb": {"MAXN": 26.7, "MODE_15W": 5.0, "MODE_30W": 10.0, "MODE_40W": 23.4},
    "agx-orin-64gb": {"MAXN": 42.6, "MODE_15W": 5.0, "MODE_30W": 10.0, "MODE_50W": 26.7},
    "agx-thor": {"max": 258.0},  # a third party prints 258.5
}
FULL_GB_S = {"nano": 25.6, "xavier-nx": 59.7, "orin-nano-4gb": 51.2, "orin-nano-8gb": 102.4, "orin-nx-8gb": 102.4,
             "orin-nx-16gb": 102.4, "agx-orin-32gb": 204.8, "agx-orin-64gb": 204.8, "agx-thor": 273.0}  # fmt: skip
# Modes that cap the memory's clock at 2133 MHz, or ran at that before Super.
CAPPED_GB_S = {
    "orin-nano-4gb": ({"10W", "10W-nosuper", "7W_AI", "7W_CPU"}, 34.1),
    "orin-nano-8gb": ({"7W", "15W", "15W-nosuper"}, 68.3),
    "orin-nx-8gb": ({"10W"}, 68.3),
    "orin-nx-16gb": ({"10W"}, 68.3),
    "agx-orin-32gb": ({"MODE_15W"}, 136.5),
    "agx-orin-64gb": ({"MODE_15W"}, 136.5),
}


@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.name)
def test_peaks_are_those_the_sources_print(board: Board) -> None:
    printed = TFLOPS[board.name]
    assert {mode.name for mode in board.modes} == set(printed)
    for mode in board.modes:
        digits = 2 if board.name == "nano" else 1
        assert board.fp16_tflops(mode) == pytest.approx(printed[mode.name], abs=0.51 * 10**-digits)
    capped, capped_gb_s = CAPPED_GB_S.get(board.name, (set(), 0.0))
    for mode in board.modes:
        gb_s = capped_gb_s if mode.name in capped else FULL_GB_S[board.name]
        assert board.bandwidth_gb_s(mode) == pytest.approx(gb_s, abs=0.1)


def test_the_marketed_sparse_int8_tops_are_four_times_the_dense_fp16() -> None:
    for name, mode, tops in (("orin-nano-8gb", "MAXN_SUPER", 67), ("orin-nano-8gb", "15W-nosuper", 41),
                             ("agx-orin-64gb", "MAXN", 170)):  # fmt: skip
        assert round(4 * board(name).fp16_tflops(board(name).mode(mode))) == tops


def test_the_efficiencies_are_what_was_measured_in_15w() -> None:
    nano = board("orin-nano-8gb")
    mode = nano.mode("15W")
    assert round(62.3 / nano.bandwidth_gb_s(mode), 2) == DRAM_EFFICIENCY
    assert round(9.68 / nano.fp16_tflops(mode), 2) == PEAK_EFFICIENCY


@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.name)
def test_every_board_names_its_sources_and_what_is_unverified(board: Board) -> None:
    assert board.sources and len({mode.name for mode in board.modes}) == len(board.modes)
    for mode in board.modes:
        unknown = {name for name, value in (("l2_bytes", board.l2_bytes), ("cpu_mhz", mode.cpu_mhz)) if value is None}
        assert {f"{name} unknown" for name in unknown} <= set(board.unverified_in(mode))
    if board.compute_capability == "8.7":  # TPCs are switched off in pairs of SMs
        assert all(mode.sm_count % 2 == 0 for mode in board.modes)


def test_what_is_not_known_is_refused_with_the_choices() -> None:
    assert board("Orin-Nano-8GB").mode("25w").gpu_mhz == 918
    with pytest.raises(InputError, match=r"there is no board 'tx2'; choose one of nano, xavier-nx, orin-nano-4gb"):
        board("tx2")
    with pytest.raises(InputError, match=r"orin-nano-8gb has no power mode '40W'; choose one of 7W, 15W, 25W, MAXN_S"):
        board("orin-nano-8gb").mode("40W")
