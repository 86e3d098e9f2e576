"""Blocks with precisions of their own: the bundle computes what PyTorch computes, by the precisions of a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.tiny_checkpoint import TINY
from helpers.warm_python import run_merino
from merino_edge import architecture, bundle
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

MIXED = [("int4", "int8"), ("int8", "int4"), ("fp16", "int4"), ("int4", "fp16"), ("int8", "fp16"), ("fp16", "int8")]


def test_each_block_is_stored_at_its_precision_and_the_rest_at_the_targets(tiny_checkpoint: Checkpoint) -> None:
    target = Target.named("onnxruntime", "int8", block_precisions=("int4", "fp16"))
    stored = store(TINY, tiny_checkpoint.weights, target)
    for name, matrix in stored.quantized.items():
        assert matrix.bits == (4 if name.startswith("blocks.0.layers.") else 8), name
    halves = [name for name, array in stored.arrays.items() if array.ndim == 2]
    assert halves and all(name.startswith("blocks.1.layers.") for name in halves)
    assert "blocks.1.projection.weight" in stored.quantized  # no part of a layer


def write(source: Checkpoint, out: Path, precision: str, own: Sequence[str]) -> bundle.Bundle:
    target = Target.named("onnxruntime", precision, block_precisions=own)
    return write_bundle(
        source, out, ExportOptions(target, 160), lambda graph, n: OnnxEngine(graph, source.architecture, n, 1)
    )


def test_bundles_run_and_lose_less_the_more_bits_blocks_have(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Parity is checked by the export, with the graph's own error apart from what rounding costs."""
    kl = {}
    for own in [("int4", "int4"), *MIXED, ("fp16", "fp16")]:
        written = write(tiny_checkpoint, tmp_path / "-".join(own), "int4", own)
        checks = {check["check"]: check["value"] for check in written.manifest["parity"]}
        kl[own] = checks["mean_kl"]
        assert written.manifest["block_precisions"] == list(own) and written.precision == "int4"
        assert checks["graph_kl"] < 0.02
    plain = write_bundle(
        tiny_checkpoint,
        tmp_path / "plain",
        ExportOptions(Target.named("onnxruntime", "int4"), 160),
        lambda graph, n: OnnxEngine(graph, TINY, n, 1),
    )
    names = ("model.onnx", "model.onnx.data")
    alike = [bundle.load(tmp_path / folder).manifest["files"] for folder in ("plain", "int4-int4")]
    assert all(alike[0][name] == alike[1][name] for name in names) and plain.manifest["block_precisions"] is None
    for high in ("int8", "fp16"):
        assert kl["int4", "int4"] > kl["int4", high] and kl["int4", "int4"] > kl[high, "int4"] > kl["fp16", "fp16"]


def test_a_results_precisions_are_exported(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    result, out = tmp_path / "result.json", tmp_path / "bundle"
    architecture.save(result, TINY, precision="int8", choices={"precisions": ["int4", "fp16"]})
    done = run_merino(
        "export", tiny_checkpoint.path, "--bits-of", result, "--threads", 1, "--context", 160, "--out", out
    )
    assert "int8 with blocks of int4, fp16" in done.stdout
    manifest = bundle.load(out).manifest
    assert (manifest["precision"], manifest["block_precisions"]) == ("int8", ["int4", "fp16"])
    assert json.loads(run_merino("show", out, "--json").stdout)["block_precisions"] == ["int4", "fp16"]
    architecture.save(result, replace(TINY, blocks=TINY.blocks[:1]), precision="int8", choices={"precisions": ["int4"]})
    refused = [
        (("--bits-of", result), "the checkpoint has other blocks; train what was found"),
        (("--bits-of", result, "--precision", "int4"), "was searched with --precision int8, not int4"),
        (("--bits-of", result, "--max-kl", 0.1, "--precision", "int8"), "--max-kl upgrades int4 matrices to int8"),
    ]
    for options, words in refused:
        done = run_merino("export", tiny_checkpoint.path, *options, "--out", tmp_path / "none", code=2)
        assert words in done.stderr and not (tmp_path / "none").exists()
    architecture.save(result, TINY, precision="int8")
    done = run_merino("export", tiny_checkpoint.path, "--bits-of", result, "--out", tmp_path / "none", code=2)
    assert "says no precisions of blocks; find them: merino-edge search --bits" in done.stderr


def test_what_a_target_cannot_mix_is_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(
        UnsupportedError, match=r"onnxruntime-cuda .* has no blocks of fp32; choose some of: fp16, int8"
    ):
        Target.named("onnxruntime-cuda", "int4", block_precisions=("fp32", "int4"))
    with pytest.raises(
        UnsupportedError, match="computes in float16 except at fp32, so blocks of fp32 do not go with i"
    ):
        Target.named("jetpack-6.2", "int4", block_precisions=("fp32", "int4"))
    with pytest.raises(UnsupportedError, match="has no blocks of int3; choose some of: fp32, fp16, int8, int4"):
        Target.named("onnxruntime", "int4", block_precisions=("int3", "int4"))
    three = Target.named("onnxruntime", "int4", block_precisions=("int4",) * 3)
    with pytest.raises(InputError, match="precisions for 3 blocks, the model has 2; give one for each block"):
        ExportOptions(three, 100).check(TINY)
    for more in ({"max_kl": 0.1}, {"max_bytes": 1}):
        options = ExportOptions(Target.named("onnxruntime", "int4", block_precisions=("int4",) * 2), 100, **more)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="every block has its precision already"):
            options.check(TINY)
