"""The roofline: its work is what the counts say, more of anything costs more, and the published speeds come out."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.counts import PRECISIONS, layer_matrix_parameters, width_projection_parameters
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export.targets import PLATFORMS
from merino_edge.jetson.estimate.boards import BOARDS, Board, PowerMode, board
from merino_edge.jetson.estimate.published_speeds import (
    LLAMA32_1B,
    QWEN3_06B,
    QWEN3_17B,
    QWEN25_05B,
    SMOLLM2_360M,
    rows,
    summaries,
)
from merino_edge.jetson.estimate.roofline import RUNTIMES, Roofline, kernels, runtime, tool_storage
from merino_edge.latency.measurement import MODES
from merino_edge.storage import TARGET_RULES, stored_as

MERINO, NANO = runtime("merino-edge"), board("orin-nano-8gb")
BOARD_MODES = [(board, mode) for board in BOARDS for mode in board.modes]
modes, lengths, precisions = st.sampled_from(MODES), st.integers(1, 2048), st.sampled_from(PRECISIONS)
runtimes, board_modes = st.sampled_from(RUNTIMES), st.sampled_from(BOARD_MODES)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    widths = sorted(draw(st.lists(st.sampled_from([64, 128, 256, 512, 768]), min_size=1, max_size=3)))
    blocks = tuple(
        Block(width, draw(st.integers(1, 6)), width // 64, draw(st.sampled_from([1, width // 64])),
              width * draw(st.integers(1, 4)), draw(st.booleans()))
        for width in widths
    )  # fmt: skip
    vocab_size, embedding = draw(st.sampled_from([2, 4096, 50272])), draw(st.sampled_from([64, 256, 768]))
    return Architecture(vocab_size, 2048, embedding, 64, blocks, ffn=draw(st.sampled_from(["relu", "swiglu"])))


def ms(a: Architecture, mode: str, length: int, precision: str = "int4", place: object = None) -> float:
    roofline = place if isinstance(place, Roofline) else Roofline(NANO, NANO.mode("25W"), MERINO)
    return roofline.model_ms(a, mode, length, precision)  # type: ignore[arg-type]


# --- the work --------------------------------------------------------------------------------------


@given(architectures(), lengths, precisions)
def test_the_work_is_what_the_counts_say(a: Architecture, length: int, precision: str) -> None:
    storage = tool_storage(precision)
    width, first, last = a.embedding_width, a.blocks[0].width, a.blocks[-1].width
    way_in, way_out = width_projection_parameters(width, first), width_projection_parameters(last, width)
    heads = a.vocab_size * width
    work = kernels(a, "prefill", length, storage, 2**40)
    flops = sum(count * k.flops for count, k in work if k.kind != "other")
    assert flops == a.flops(length) + 2 * (length * way_in + way_out + heads)  # the head sees one position

    unshared = dataclasses.replace(a, blocks=tuple(dataclasses.replace(b, shared=False) for b in a.blocks))
    layers = sum(b.layers * layer_matrix_parameters(a, b) for b in a.blocks)
    inner = sum(width_projection_parameters(x.width, y.width) for x, y in zip(a.blocks, a.blocks[1:], strict=False))
    stored = (layers + inner + way_in + way_out) * storage.matrix_bytes + heads * storage.head_bytes
    read = sum(count * k.dram_bytes for count, k in kernels(unshared, "decode", length, storage, 2**40))
    assert read == pytest.approx(stored + a.kv_bytes(length, int(storage.cache_bytes)))


@pytest.mark.parametrize(("name", "precision"), [(n, p) for n, r in TARGET_RULES.items() for p in r.precisions])
def test_a_targets_step_reads_what_its_bundle_stores(name: str, precision: str) -> None:
    """All stored matrices but the embedding's table, of which a step reads a row; scales of whole rows left out."""
    a = Architecture(512, 64, 256, 64, (Block(256, 2, 4, 2, 512),), tied_head=False, norm="rmsnorm", bias="none")
    stored = counts.weight_bytes(a, precision, name)
    embedding = stored_as(precision, name).embedding.bytes(a.vocab_size, 256)
    rest = sum(4 * 256 for _ in range(5)) + stored_as(precision, name).positions.bytes(64, 256)
    storage = tool_storage(precision, name)
    empty = dataclasses.replace(storage, matrix_bytes=0, head_bytes=0)  # its kernels move activations only
    read, moved = (
        sum(n * k.dram_bytes for n, k in kernels(a, "decode", 1, form, 0) if k.kind == "matrix")
        for form in (storage, empty)
    )
    assert read - moved == pytest.approx(stored - embedding - rest, rel=0.02)


def test_a_roofline_refuses_a_target_that_its_board_or_runtime_cannot_run() -> None:
    mode, thor = NANO.mode("25W"), board("agx-thor")
    assert Roofline(NANO, mode, MERINO, "jetpack-6.2") and Roofline(thor, thor.modes[0], MERINO, "jetpack-7.1")
    with pytest.raises(UnsupportedError, match=r"orin-nano-8gb cannot run a bundle for jetpack-7.1 .*jetpack-6.2"):
        Roofline(NANO, mode, MERINO, "jetpack-7.1")
    with pytest.raises(UnsupportedError, match="for onnxruntime on its GPU"):
        Roofline(NANO, mode, MERINO, "onnxruntime")
    with pytest.raises(UnsupportedError, match="unknown target 'jetpack'"):
        Roofline(NANO, mode, MERINO, "jetpack")
    with pytest.raises(InputError, match=r"runtime llama.cpp runs no bundle; leave out --target"):
        Roofline(NANO, mode, runtime("llama.cpp"), "jetpack-6.2")


def test_boards_run_the_targets_that_name_them() -> None:
    for name, family in (("orin-nano-8gb", "Orin"), ("agx-thor", "Thor")):
        tensorrt = [n for n, p in PLATFORMS.items() if p.tensorrt and family in p.boards]
        assert [*tensorrt, "onnxruntime-cuda"] == list(board(name).targets)


@given(architectures(), modes, lengths, st.integers(0, 2**24))
def test_l2_only_moves_bytes(a: Architecture, mode: str, length: int, l2_bytes: int) -> None:
    """What L2 serves does not come from memory, and the kernels stay as many."""
    storage = tool_storage("int4")
    small, large = (kernels(a, mode, length, storage, size) for size in (0, l2_bytes))  # type: ignore[arg-type]
    totals = [[sum(n * k.dram_bytes + n * k.l2_bytes for n, k in work), sum(n for n, _ in work)]
              for work in (small, large)]  # fmt: skip
    assert totals[0] == pytest.approx(totals[1])
    assert sum(n * k.dram_bytes for n, k in large) <= sum(n * k.dram_bytes for n, k in small) * (1 + 1e-12)


def test_weights_of_a_shared_block_are_read_once_where_a_layer_fits_in_l2() -> None:
    def read(width: int, *, shared: bool) -> float:
        a = Architecture(2, 64, width, 64, (Block(width, 4, width // 64, width // 64, width, shared),))
        work = kernels(a, "decode", 1, tool_storage("int4"), 2 * 2**20)
        return sum(count * k.dram_bytes for count, k in work)

    assert read(256, shared=True) < 0.3 * read(256, shared=False)
    assert read(1024, shared=True) == read(1024, shared=False)  # 3.9 MB a layer


# --- time is monotone ------------------------------------------------------------------------------


def never_faster(more: float, less: float) -> bool:
    return more >= less * (1 - 1e-12)


@given(architectures(), modes, lengths, precisions, runtimes, board_modes, st.floats(1, 4))
def test_more_board_is_never_slower(
    a: Architecture, mode: str, length: int, precision: str, by: object, place: tuple[Board, PowerMode], factor: float
) -> None:
    where, power = place
    less = Roofline(where, power, by)  # type: ignore[arg-type]
    bigger = [
        dataclasses.replace(less, power_mode=dataclasses.replace(power, emc_mhz=power.emc_mhz * factor)),
        dataclasses.replace(less, power_mode=dataclasses.replace(power, gpu_mhz=power.gpu_mhz * factor)),
        dataclasses.replace(less, power_mode=dataclasses.replace(power, sm_count=math.ceil(power.sm_count * factor))),
        dataclasses.replace(less, board=dataclasses.replace(where, l2_bytes=int((where.l2_bytes or 0) * factor))),
        dataclasses.replace(less, power_mode=dataclasses.replace(power, cpu_mhz=(power.cpu_mhz or 1497.6) * factor)),
    ]
    here = ms(a, mode, length, precision, less)
    assert all(never_faster(here, ms(a, mode, length, precision, more)) for more in bigger)


@given(architectures(), modes, st.integers(1, 1024), precisions, runtimes, board_modes)
def test_more_model_is_never_faster(
    a: Architecture, mode: str, length: int, precision: str, by: object, place: tuple[Board, PowerMode]
) -> None:
    roofline = Roofline(*place, by)  # type: ignore[arg-type]
    last = a.blocks[-1]

    def with_last(**changes: int | bool) -> Architecture:
        return dataclasses.replace(a, blocks=(*a.blocks[:-1], dataclasses.replace(last, **changes)))  # type: ignore[arg-type]

    larger = [
        with_last(layers=last.layers + 1),
        with_last(ffn_width=2 * last.ffn_width),
        with_last(kv_heads=last.heads),
        with_last(shared=False),
        dataclasses.replace(a, vocab_size=2 * a.vocab_size),
        dataclasses.replace(a, ffn="swiglu"),
    ]
    # GGUF's formats depend on the width, and a block as wide as the embedding is spared the projections.
    if roofline.runtime.name in ("merino-edge", "edge-llm") and a.embedding_width != 2 * last.width:
        heads = 2 * last.heads
        larger.append(with_last(width=2 * last.width, heads=heads, kv_heads=2 * last.kv_heads))
    here = ms(a, mode, length, precision, roofline)
    assert all(never_faster(ms(b, mode, length, precision, roofline), here) for b in larger)
    assert never_faster(ms(a, mode, 2 * length, precision, roofline), here)


@given(architectures(), lengths, board_modes)
def test_fewer_bits_are_never_slower(a: Architecture, length: int, place: tuple[Board, PowerMode]) -> None:
    roofline = Roofline(*place, MERINO)
    int4, int8, fp16, fp32 = (ms(a, "decode", length, precision, roofline) for precision in reversed(PRECISIONS))
    assert never_faster(int8, int4) and never_faster(fp16, int8) and never_faster(fp32, fp16)


# --- against what was published --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "parameters"),
    [(SMOLLM2_360M, 361.8e6), (QWEN25_05B, 494.0e6), (LLAMA32_1B, 1235.8e6), (QWEN3_17B, 1720.6e6),
     (QWEN3_06B, 596.0e6 + 2 * 1024 * 2048)],
    ids=["SmolLM2-360M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Qwen3-1.7B", "Qwen3-0.6B and two projections"],
)  # fmt: skip
def test_the_published_models_have_their_published_size(a: Architecture, parameters: float) -> None:
    assert a.parameters == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize("framework", ["llama.cpp", "ollama"])
def test_smollm2_135m_ranks_the_four_power_modes_as_published(framework: str) -> None:
    mine = [row for row in rows() if (row.framework, row.model) == (framework, "SmolLM2-135M")]
    assert len(mine) == 4
    predicted = sorted(mine, key=lambda row: row.predicted_tokens_per_s())
    assert predicted == sorted(mine, key=lambda row: row.tokens_per_s)
    assert all(abs(row.to_dict()["error_percent"]) < 20 for row in mine)


def test_the_factor_of_maxn_super_is_llama_cpps_alone() -> None:
    """Published: under llama.cpp both SmolLM2 lose in MAXN_SUPER, under Ollama every model gains."""
    speed = {(r.framework, r.model, r.power_mode): r.tokens_per_s for r in rows()}
    gains = {k[:2]: speed[(*k[:2], "MAXN_SUPER")] / v for k, v in speed.items() if k[2] == "25W"}
    assert {model for (framework, model), gain in gains.items() if framework == "llama.cpp" and gain < 1} == {
        "SmolLM2-135M",
        "SmolLM2-360M",
    }
    clock = NANO.mode("MAXN_SUPER").gpu_mhz / NANO.mode("25W").gpu_mhz
    assert all(g == pytest.approx(clock, rel=0.025) for (framework, _), g in gains.items() if framework == "ollama")
    assert [r.name for r in RUNTIMES if r.clock_factors] == ["llama.cpp"]


def test_how_far_off_the_rest_is() -> None:
    """Of rows that nothing was fitted to; docs and `--check` print the figures."""
    tested = {(s["framework"], s["mode"]): s for s in summaries(rows()) if s["rows"] == "tested"}
    limits = {"llama.cpp": 10, "ollama": 15, "edge-llm": 12, "mlc": 10, "bf16": 10}
    assert {name for name, _ in tested} == set(limits)
    for framework, limit in limits.items():
        figures = tested[framework, "decode"]
        assert figures["mape_percent"] < limit
        assert figures["kendall_tau"] is None or figures["kendall_tau"] > 0.75
    assert tested["edge-llm", "prefill"]["mape_percent"] < 20


def test_an_unknown_runtime_or_precision_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"no runtime 'vllm'; did you mean ollama\? choose one of merino-edge, edge-llm, llama\.cpp"
    ):
        runtime("vllm")
    with pytest.raises(InputError, match="there is no precision 'fp8'"):
        ms(LLAMA32_1B, "decode", 1, "fp8")
