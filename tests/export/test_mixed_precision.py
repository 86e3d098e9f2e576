"""Upgrades to int8: estimated costs agree with measured ones, limits hold, and bundles hold the upgraded matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.random_model import random_model
from helpers.tiny_checkpoint import TINY
from merino_edge import checkpoint as checkpoints
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export import mixed_precision, parity
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.mixed_precision import MARGIN, Upgrade, upgrades_within_bytes, upgrades_within_kl
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.quantization.stored_weights import StoredWeights, store
from merino_edge.export.sensitivity import rounding_costs
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.weights import group_by_input

INT4 = Target.named("onnxruntime", "int4")


def one_rounded(weights: dict[str, np.ndarray], stored: StoredWeights, unit: Sequence[str]) -> dict[str, np.ndarray]:
    return weights | {name: stored.quantized[name].dequantize() for name in unit}


def matrices(stored: StoredWeights) -> list[str]:
    return [name for name, matrix in stored.quantized.items() if matrix.bits == 4]


def test_costs_of_one_position_are_its_divergences() -> None:
    """With one position the method assumes only that rounding errors are small."""
    weights = random_model(TINY, strength=0.7)
    stored, tokens = store(TINY, weights, INT4), np.array([7])
    units = group_by_input(matrices(stored))
    # A tenth of the rounding error, so that only the second order counts.
    near = {
        name: weights[name] + 0.1 * (stored.quantized[name].dequantize() - weights[name]) for name in matrices(stored)
    }

    class Near:
        def __init__(self, name: str) -> None:
            self.name = name

        def dequantize(self) -> np.ndarray:
            return near[self.name]

    forms = {unit: [{name: Near(name) for name in unit}] for unit in units}
    costs = rounding_costs(TINY, weights, forms, tokens, samples=600)  # type: ignore[arg-type]
    expected = parity.TorchReference(TINY, weights).logits(tokens)
    for unit in units:
        if all("attention.query" not in name for name in unit):  # query and key do nothing at one position
            got = parity.TorchReference(TINY, weights | {name: near[name] for name in unit}).logits(tokens)
            assert costs[unit][0] == pytest.approx(parity.mean_kl(expected, got), rel=0.3), unit


def test_costs_rank_matrices_as_measuring_each_does() -> None:
    weights = random_model(TINY, strength=1.0)
    stored, tokens = store(TINY, weights, INT4), np.random.default_rng(0).integers(0, TINY.vocab_size, 150)
    units = group_by_input(matrices(stored))
    forms = {unit: [{name: stored.quantized[name] for name in unit}] for unit in units}
    costs = rounding_costs(TINY, weights, forms, tokens)
    expected = parity.TorchReference(TINY, weights).logits(tokens)
    estimated = np.array([costs[unit][0] for unit in units])
    measured = np.array(
        [
            parity.mean_kl(expected, parity.TorchReference(TINY, one_rounded(weights, stored, unit)).logits(tokens))
            for unit in units
        ]
    )
    assert np.corrcoef(np.log(estimated), np.log(measured))[0, 1] > 0.8
    assert 0.4 < estimated.sum() / measured.sum() < 2.5


def test_units_are_what_the_graph_writes_as_one() -> None:
    stored = store(TINY, random_model(TINY), INT4)
    names = matrices(stored)
    units = group_by_input(names)
    assert sorted(name for unit in units for name in unit) == sorted(names)
    layer = "blocks.0.layers.0."
    assert tuple(f"{layer}attention.{n}.weight" for n in ("query", "key", "value")) in units
    assert (f"{layer}ffn.gate.weight", f"{layer}ffn.up.weight") in units
    assert (f"{layer}attention.output.weight",) in units and (f"{layer}ffn.down.weight",) in units


UPGRADES = st.lists(
    st.builds(Upgrade, st.just({}), st.floats(-1e-3, 1), st.integers(1, 10**6)), min_size=1, max_size=40
)


@given(UPGRADES, st.integers(0, 10**7))
def test_bytes_are_kept(candidates: list[Upgrade], spare_bytes: int) -> None:
    upgrades = upgrades_within_bytes(candidates, spare_bytes)
    used = sum(u.added_bytes for u in upgrades)
    assert used <= spare_bytes and all(u.saved_kl > 0 for u in upgrades)
    left_out = [c for c in candidates if c.saved_kl > 0 and not any(c is u for u in upgrades)]
    assert all(used + c.added_bytes > spare_bytes for c in left_out)


@given(UPGRADES, st.floats(1e-3, 2), st.floats(0.2, 5), st.floats(0, 0.1))
def test_nats_are_kept_however_far_off_the_estimate_is(
    candidates: list[Upgrade], max_kl: float, factor: float, rest: float
) -> None:
    def measure(upgrades: Sequence[Upgrade]) -> float:
        left = sum(max(c.saved_kl, 0.0) for c in candidates) - sum(max(u.saved_kl, 0.0) for u in upgrades)
        return factor * max(left, 0.0) + rest

    try:
        upgrades = upgrades_within_kl(candidates, max_kl, measure, lambda step: None)
    except UnsupportedError:
        assert measure(candidates) > MARGIN * max_kl
    else:
        assert measure(upgrades) <= MARGIN * max_kl


def export(
    source: Checkpoint, out: Path, max_kl: float | None = None, max_bytes: int | None = None
) -> tuple[int, float, list[str]]:
    a = source.architecture
    bundle = write_bundle(
        source,
        out,
        ExportOptions(INT4, 160, max_kl=max_kl, max_bytes=max_bytes),
        lambda graph, n: OnnxEngine(graph, a, n, 1),
    )
    size = sum(file.stat().st_size for file in out.iterdir())
    kl = next(check["value"] for check in bundle.manifest["parity"] if check["check"] == "mean_kl")
    return size, kl, bundle.manifest["raised_to_int8"]


def test_bundles_keep_within_bytes_and_nats(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain, plain_kl, none = export(tiny_checkpoint, tmp_path / "plain")
    assert none == []
    size, kl, upgraded = export(tiny_checkpoint, tmp_path / "mb", max_bytes=plain + 40_000)
    assert upgraded and kl < plain_kl and plain < size <= plain + 40_000
    size, kl, upgraded = export(tiny_checkpoint, tmp_path / "kl", max_kl=plain_kl / 3)
    assert upgraded and kl <= plain_kl / 3
    with pytest.raises(UnsupportedError, match="MB over --max-mb"):
        export(tiny_checkpoint, tmp_path / "none", max_bytes=plain // 2)
    with pytest.raises(UnsupportedError, match="MB more than --max-mb; give up one of them"):
        export(tiny_checkpoint, tmp_path / "none", max_kl=plain_kl / 3, max_bytes=plain + 20_000)
    with pytest.raises(UnsupportedError, match="all matrices at int8"):
        export(tiny_checkpoint, tmp_path / "none", max_kl=1e-9)
    assert not (tmp_path / "none").exists()


def test_a_model_of_few_positions_is_mixed_too(tmp_path: Path) -> None:
    a = dataclasses.replace(TINY, max_positions=20)
    path = tmp_path / "checkpoint"
    tokenizer = train_tokenizer(iter([parity.TEXT]), a.vocab_size)
    checkpoints.save(
        path, a, random_model(a), tokenizer_json=tokenizer.to_str(), chat=chat_format(), training={"source": "random"}
    )
    for target, out in ((INT4, tmp_path / "ort"), (Target.named("jetpack-6.2", "int4"), tmp_path / "board")):
        bundle = write_bundle(
            checkpoints.load(path),
            out,
            ExportOptions(target, 20, max_bytes=10**7),
            lambda graph, n: OnnxEngine(graph, a, n, 1),
        )
        assert bundle.manifest["raised_to_int8"]


def test_only_int4_is_mixed(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only int4"):
        write_bundle(
            tiny_checkpoint,
            tmp_path / "b",
            ExportOptions(Target.named("onnxruntime", "int8"), 160, max_kl=1.0),
            lambda *_: None,
        )


def test_an_upgraded_matrix_is_counted_with_its_bytes(tiny_checkpoint: Checkpoint) -> None:
    plain = store(tiny_checkpoint.architecture, tiny_checkpoint.weights, INT4)
    tokens = np.arange(60)
    for upgrade in mixed_precision.upgrade_candidates(tiny_checkpoint, plain, INT4, tokens):
        for name, matrix in upgrade.matrices.items():
            assert matrix.bits == 8
            assert matrix.stored_bytes == matrix.codes.size + 2 * matrix.scales.size
            assert plain.quantized[name].stored_bytes < matrix.stored_bytes
