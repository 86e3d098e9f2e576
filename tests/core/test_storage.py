"""What is counted as stored equals what an export writes, for every target, precision and kind of architecture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export.fitting import fitted
from merino_edge.export.graph import build_stored, save, save_beside
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import PLATFORMS, Target
from merino_edge.storage import PRECISIONS, TARGET_RULES, stored_as

PAIRS = [(name, precision) for name, rules in TARGET_RULES.items() for precision in rules.precisions]
SMALL_BYTES = 1000  # of shapes and single numbers, which no count has

# Widths that change, grouped heads, both kinds of sharing, every kind of norm, FFN, bias, position and head.
LLAMA = Architecture(
    vocab_size=320,
    max_positions=160,
    embedding_width=96,
    head_dim=32,
    blocks=(Block(64, 1, 2, 1, 96), Block(64, 2, 2, 2, 160, shared=True), Block(128, 2, 4, 2, 192)),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=32,
    bias="none",
)
OPT = Architecture(
    vocab_size=257,
    max_positions=130,
    embedding_width=64,
    head_dim=32,
    blocks=(Block(64, 1, 2, 2, 160), Block(96, 2, 3, 3, 96)),
    position_offset=2,
)
ARCHITECTURES = {
    "llama": LLAMA,
    "untied": replace(LLAMA, tied_head=False, bias="qkv"),
    "opt": OPT,
    "post": replace(OPT, norm_placement="post", ffn="gelu"),
    "neox": replace(OPT, tied_head=False, positions="rotary", rotary_dim=16, position_offset=0, parallel_residual=True),
}
# Inputs that are no multiple of a block: such matrices are floats, or int8 with a scale a row.
ODD_BLOCKS = (Block(48, 1, 3, 1, 72), Block(80, 1, 5, 1, 100))
ODD = replace(LLAMA, head_dim=16, rotary_dim=16, embedding_width=40, blocks=ODD_BLOCKS)


def written_bytes(a: Architecture, target: Target, folder: Path) -> int:
    """Bytes of all weights that an export writes, those of the primitive graph beside the native one included."""
    stored, graph = random_stored(a, target), folder / "model.onnx"
    save(build_stored(a, stored, target, a.max_positions), graph)
    sizes = sizes_in(graph)
    if target.has_fallback:
        fallback = replace(target, lowering="primitive")
        save_beside(build_stored(a, stored, fallback, a.max_positions), folder / "primitive.onnx", graph)
        sizes = {**sizes_in(folder / "primitive.onnx"), **sizes}
    return sum(size for name, size in sizes.items() if not name.endswith(".twin"))


def sizes_in(graph: Path) -> dict[str, int]:
    """The bytes of each weight, in the graph or in the file beside it."""
    sizes = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        outside = {entry.key: entry.value for entry in tensor.external_data}
        sizes[tensor.name] = int(outside["length"]) if outside else len(tensor.raw_data)
    return sizes


@pytest.mark.parametrize(("target", "precision"), PAIRS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counted_weights_are_those_that_an_export_writes(
    name: str, target: str, precision: str, tmp_path: Path
) -> None:
    a = ARCHITECTURES[name]
    written = written_bytes(a, Target.named(target, precision), tmp_path)
    assert 0 <= written - counts.weight_bytes(a, precision, target) < SMALL_BYTES
    # The file of weights has them all, but for what is so small that it stays in the graph.
    assert (tmp_path / "model.onnx.data").stat().st_size <= written


@pytest.mark.parametrize("target", TARGET_RULES)
@pytest.mark.parametrize("precision", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("own", [("int4", "int8", "fp16"), ("int8", "fp16", "int4"), ("fp16", "int4", "int8")])
def test_blocks_of_precisions_of_their_own_are_counted_as_they_are_written(
    target: str, precision: str, own: tuple[str, ...], tmp_path: Path
) -> None:
    a = ARCHITECTURES["untied"]
    written = written_bytes(a, Target.named(target, precision, block_precisions=own), tmp_path)
    assert 0 <= written - counts.weight_bytes(a, precision, target, own) < SMALL_BYTES
    assert written != counts.weight_bytes(a, precision, target)


@pytest.mark.parametrize(("target", "precision"), PAIRS)
def test_sizes_that_no_block_divides_are_counted_as_they_are_written(
    target: str, precision: str, tmp_path: Path
) -> None:
    written = written_bytes(ODD, Target.named(target, precision), tmp_path)
    assert 0 <= written - counts.weight_bytes(ODD, precision, target) < SMALL_BYTES


@pytest.mark.parametrize(("target", "precision"), PAIRS)
@pytest.mark.parametrize("bias", [False, True])
def test_short_convolutions_are_counted_as_they_are_written(
    target: str, precision: str, bias: bool, tmp_path: Path
) -> None:
    blocks = (Block(64, 1, 2, 1, 96, convolution=3), Block(64, 1, 2, 2, 96), Block(96, 2, 3, 1, 96, convolution=4))
    a = replace(LLAMA, blocks=blocks, convolution_bias=bias)
    written = written_bytes(a, Target.named(target, precision), tmp_path)
    assert 0 <= written - counts.weight_bytes(a, precision, target) < SMALL_BYTES
    # One layer of attention has a cache, 64 wide; the states have 2 rows of 64 and twice 3 of 96, float32.
    assert a.kv_bytes(100) == 2 * 64 * 100 * 2 + (2 * 64 + 2 * 3 * 96) * 4


WINDOWED = replace(LLAMA, max_positions=2000, blocks=(Block(64, 3, 2, 1, 96, window=64), Block(64, 1, 2, 2, 96)))
WINDOWS = {
    "little is left": WINDOWED,
    "much is left": replace(WINDOWED, max_positions=300),
    "two windows": replace(
        WINDOWED,
        blocks=(*WINDOWED.blocks, Block(64, 2, 2, 1, 96, window=200, rotary="local")),
        local_rotary_base=100.0,
    ),
    "windows everywhere": replace(WINDOWED, blocks=WINDOWED.blocks[:1]),
}


@pytest.mark.parametrize(("target", "precision"), [pair for pair in PAIRS if pair[1] in ("fp32", "int4")])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_counted_as_they_are_written(name: str, target: str, precision: str, tmp_path: Path) -> None:
    a = WINDOWS[name]
    resolved = fitted(Target.named(target, precision), a, a.max_positions)
    written = written_bytes(a, resolved, tmp_path)
    assert 0 <= written - counts.weight_bytes(a, precision, target) < SMALL_BYTES
    rings = resolved.on_tensorrt and resolved.lowering == "primitive"
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    caches = [value.type.tensor_type for value in graph.input if value.name.startswith(("key_", "value_"))]
    elements = sum(math.prod(d.dim_value or a.max_positions for d in cache.shape.dim) for cache in caches)
    element = counts.cache_element_bytes(precision, target)
    assert elements * element == a.kv_bytes(element_bytes=element, rings=rings)


def test_another_lowering_for_a_small_rotation_is_counted(tmp_path: Path) -> None:
    a = replace(LLAMA, rotary_dim=8)
    usual = Target.named("onnxruntime", "fp32")
    written = written_bytes(a, fitted(usual, a, a.max_positions), tmp_path)
    assert 0 <= written - counts.weight_bytes(a, "fp32", "onnxruntime") < SMALL_BYTES
    assert abs(written - counts.weight_bytes(a, "fp32")) > SMALL_BYTES  # without a target no lowering is counted


def test_every_target_of_export_has_its_rules() -> None:
    assert tuple(TARGET_RULES) == tuple(PLATFORMS)
    for name, platform in PLATFORMS.items():
        assert TARGET_RULES[name] == platform.rules


def test_without_a_target_weights_are_onnxruntimes_and_the_cache_a_gpus() -> None:
    for a in ARCHITECTURES.values():
        for precision in PRECISIONS:
            target = counts.weight_bytes(a, precision, "onnxruntime")
            angles = 4 * a.rotary_dim * a.max_positions
            assert counts.weight_bytes(a, precision) == target - angles
    assert [counts.cache_element_bytes(p) for p in PRECISIONS] == [4, 2, 2, 2]
    assert [counts.cache_element_bytes(p, "onnxruntime") for p in PRECISIONS] == [4, 4, 4, 4]
    assert [counts.cache_element_bytes(p, "jetpack-6.2") for p in PRECISIONS] == [4, 2, 2, 2]


def test_a_target_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="onnxruntime-cuda has no fp32; choose one of: fp16, int8, int4"):
        stored_as("fp32", "onnxruntime-cuda")
    with pytest.raises(
        UnsupportedError, match=r"unknown target 'jetpack'; did you mean jetpack-7\.2\? choose one of onnxruntime,"
    ):
        counts.weight_bytes(LLAMA, "int4", "jetpack")
    with pytest.raises(InputError, match="there is no precision 'fp8'"):
        stored_as("fp8", "rtx")
