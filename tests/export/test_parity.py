"""Parity decides: a faithful export passes, an unfaithful one fails and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from merino_edge import bundle, checkpoint
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.counts import PRECISIONS
from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import ArtefactError, InputError, MerinoError, OutputError, ParityError, UnsupportedError
from merino_edge.export import bundle_writer, parity, prepare_weights
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.graph import build_stored, save
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.quantization.stored_weights import StoredWeights, store
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.runtime.engines.onnx_engine import OnnxEngine


def export(
    source: Checkpoint,
    out: Path,
    precision: str = "fp32",
    context: int = 160,
    *,
    target: str = "onnxruntime",
    lowering: str = "",
    smaller_contexts: Sequence[int] = (),
    block: int = 32,
) -> bundle.Bundle:
    a, resolved = source.architecture, Target.named(target, precision, lowering, block=block)

    def open_engine(graph: Path, capacity: int) -> OnnxEngine:
        return OnnxEngine(graph, a, capacity, threads=1)

    return write_bundle(source, out, ExportOptions(resolved, context, smaller_contexts=smaller_contexts), open_engine)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_faithful_export_passes_and_loads(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str, lowering: str
) -> None:
    written = export(tiny_checkpoint, tmp_path / "b", precision, lowering=lowering)
    opened = bundle.load(tmp_path / "b")
    assert opened.manifest == written.manifest
    assert {c["check"] for c in opened.manifest["parity"]} >= set(parity.LIMITS[precision])
    assert all(c["passed"] for c in opened.manifest["parity"])
    assert opened.architecture == tiny_checkpoint.architecture


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wrong_graph_fails_and_leaves_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Two matrices of one layer mixed up: the smallest mistake a lowering can make."""
    gate, up = (f"blocks.0.layers.0.ffn.{name}.weight" for name in ("gate", "up"))

    def mixed_up(
        a: Architecture, stored: StoredWeights, target: Target, context: int, capacity: int | None = None
    ) -> ir.Model:
        arrays, quantized = (
            {**group, gate: group[up], up: group[gate]} if gate in group else group
            for group in (stored.arrays, stored.quantized)
        )
        return build_stored(a, StoredWeights(arrays, quantized), target, context, capacity)

    monkeypatch.setattr(bundle_writer, "build_stored", mixed_up)
    with pytest.raises(ParityError, match="graph_kl"):
        export(tiny_checkpoint, tmp_path / "b", precision)
    assert os.listdir(tmp_path) == []


def test_weights_too_coarse_for_their_precision_fail(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is right, but what it holds is int4 under the name of int8."""
    monkeypatch.setattr(prepare_weights, "store", lambda a, w, *_: store(a, w, Target.named("onnxruntime", "int4")))
    with pytest.raises(ParityError, match="mean_kl"):
        export(tiny_checkpoint, tmp_path / "b", "int8")
    assert os.listdir(tmp_path) == []


class OfOtherWeights:
    """An engine that is PyTorch with weights that are off by `noise`, and without a cache."""

    def __init__(self, source: Checkpoint, noise: float) -> None:
        rng = np.random.default_rng(3)
        weights = {name: w + rng.normal(0, noise, w.shape).astype(np.float32) for name, w in source.weights.items()}
        self.reference, self.text, self.steps = parity.TorchReference(source.architecture, weights), [0], 0

    def forward(self, tokens: np.ndarray, position: int) -> np.ndarray:
        self.text, self.steps = [*self.text[:position], *tokens.tolist()], self.steps + 1
        return self.reference.logits(np.asarray(self.text))[-1]


@pytest.mark.parametrize("noise", [0.0, 2e-3, 1e-2, 0.3])
def test_greedy_tokens_agree_until_the_first_difference(tiny_checkpoint: Checkpoint, noise: float) -> None:
    """However many are decoded before one looks for it: the difference is at 60, 17, 5 and 0 here."""
    start, count = np.arange(4), 60
    reference = parity.TorchReference(tiny_checkpoint.architecture, tiny_checkpoint.weights)
    engine, text, agreed = OfOtherWeights(tiny_checkpoint, noise), start.tolist(), 0
    while agreed < count:
        own = engine.reference.logits(np.asarray(text))[-1].argmax()
        expected = reference.logits(np.asarray(text))[-1]
        if expected.max() - expected[own] > parity.TIE:
            break
        text, agreed = [*text, int(own)], agreed + 1
    assert parity.greedy_agreement(reference, engine, start, count) == agreed  # type: ignore[arg-type]
    assert engine.steps == (parity.FIRST_GREEDY if agreed < parity.FIRST_GREEDY else count)
    assert parity.greedy_agreement(reference, engine, start, 0) == 0  # type: ignore[arg-type]


def test_every_context_from_one_on_is_compared(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    for context in (1, 2, 3, 31, 192):
        written = export(tiny_checkpoint, tmp_path / str(context), context=context)
        assert written.context == context and all(c["passed"] for c in written.manifest["parity"])


@pytest.mark.parametrize("lowering", ["native", "primitive"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_graphs_of_smaller_caches_share_one_file_of_weights(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str, lowering: str
) -> None:
    one = export(tiny_checkpoint, tmp_path / "one", precision, target="rtx", lowering=lowering)
    written = export(
        tiny_checkpoint, tmp_path / "b", precision, target="rtx", lowering=lowering, smaller_contexts=(100, 1)
    )
    assert written.contexts == [1, 100, 160] and one.contexts == [160]
    assert {c["check"] for c in written.manifest["parity"]} >= {"graph_kl_1", "graph_kl_100"}
    data = "model.onnx.data"
    assert written.manifest["files"][data] == one.manifest["files"][data]
    more = {"model-1.onnx", "model-100.onnx"}
    if lowering == "native":  # the primitive graphs are there for a board that does not compile the native ones
        assert {c["check"] for c in written.manifest["parity"]} >= {f"graph_kl_primitive_{n}" for n in (1, 100, 160)}
        assert one.primitive_graph_of(160) == tmp_path / "one" / "model-primitive.onnx"
        more |= {"model-primitive-1.onnx", "model-primitive-100.onnx"}
    assert set(written.manifest["files"]) == {*one.manifest["files"], *more}
    assert (one.primitive_graph_of(160) is None) == (lowering == "primitive")
    assert len(written.onnx_sha256s(100)) == (2 if lowering == "native" else 1)
    graphs = [(capacity, written.graph_of(capacity)) for capacity in written.contexts]
    graphs += [(n, graph) for n in written.contexts if (graph := written.primitive_graph_of(n))]
    for capacity, path in graphs:
        graph = ir.load(path).graph
        caches = [v.shape[2] for v in graph.inputs if v.name.startswith(("key_", "value_"))]
        assert caches == [capacity] * 2 * written.architecture.layers
        assert ("Softmax" in {node.op_type for node in graph}) == (lowering == "primitive" or "primitive" in path.name)
        size = written.manifest["files"][path.name]["bytes"]
        assert size < written.manifest["files"][data]["bytes"] / 2  # no weights in it, but the angles


def test_a_smaller_graph_that_differs_leaves_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(
        a: Architecture, stored: StoredWeights, target: Target, context: int, capacity: int | None = None
    ) -> ir.Model:
        norms = {name: 3 * array for name, array in stored.arrays.items() if "ffn_norm" in name and capacity}
        return build_stored(a, replace(stored, arrays=stored.arrays | norms), target, context, capacity)

    monkeypatch.setattr(bundle_writer, "build_stored", foreign)
    monkeypatch.setattr(bundle_writer, "save_beside", lambda model, path, saved: save(model, path))
    with pytest.raises(ParityError, match="graph_kl_64"):
        export(tiny_checkpoint, tmp_path / "b", "fp16", target="rtx", smaller_contexts=(64,))
    assert os.listdir(tmp_path) == []


def test_figures_are_zero_for_equal_logits_and_grow_with_the_difference() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((20, 50)).astype(np.float32)
    assert parity.mean_kl(expected, expected + 3) == pytest.approx(0, abs=1e-6)  # a constant changes nothing
    small, large = (parity.mean_kl(expected, expected + s * rng.standard_normal((20, 50))) for s in (0.1, 1.0))
    assert 0 < small < large
    assert parity.top1_agreement(expected, expected) == 1.0
    assert parity.top1_agreement(expected, -expected) == 0.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"context": 0}, InputError),
        ({"context": 193}, InputError),
        ({"precision": "fp8"}, UnsupportedError),
        ({"target": "jetpack-9"}, UnsupportedError),
        ({"target": "rtx", "precision": "fp32", "lowering": "native"}, UnsupportedError),
        ({"target": "jetpack-6.2", "lowering": "native"}, UnsupportedError),
        ({"target": "jetpack-6.0"}, UnsupportedError),
        ({"target": "jetpack-7.2", "lowering": "ort"}, UnsupportedError),
        ({"lowering": "traced"}, UnsupportedError),
        ({"precision": "int4", "block": 48}, UnsupportedError),
        ({"precision": "fp16", "block": 64}, UnsupportedError),
        ({"target": "rtx", "precision": "int8", "block": 64}, UnsupportedError),
        ({"smaller_contexts": (32, 64)}, InputError),  # ONNX Runtime binds any capacity
        ({"target": "rtx", "precision": "fp16", "smaller_contexts": (64, 160)}, InputError),
        ({"target": "rtx", "precision": "fp16", "smaller_contexts": (0,)}, InputError),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    tiny_checkpoint: Checkpoint, tmp_path: Path, options: dict[str, object], error: type[MerinoError]
) -> None:
    with pytest.raises(error) as refusal:
        export(tiny_checkpoint, tmp_path / "b", **options)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value) and refusal.value.hint
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    foreign = train_tokenizer(iter([parity.TEXT]), 400)  # the model has 300 tokens
    a, weights = tiny_checkpoint.architecture, tiny_checkpoint.weights
    checkpoint.save(
        tmp_path / "c",
        a,
        weights,
        tokenizer_json=foreign.to_str(),
        chat=tiny_checkpoint.chat,
        training={"source": "random"},
    )
    with pytest.raises(ArtefactError, match="the model has 300 tokens"):
        export(checkpoint.load(tmp_path / "c"), tmp_path / "b")
    assert os.listdir(tmp_path) == ["c"]


def test_a_folder_of_something_else_is_not_replaced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    with pytest.raises(OutputError, match="not an artefact"):
        export(tiny_checkpoint, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "keep me"


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "tokenizer.json", "chat.json", "manifest.json"])
def test_a_flipped_bit_truncation_or_loss_of_any_file_is_found(
    tiny_checkpoint: Checkpoint, tmp_path: Path, file: str
) -> None:
    export(tiny_checkpoint, tmp_path / "b")
    path = tmp_path / "b" / file
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:]):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError) as refusal:
            bundle.load(tmp_path / "b")
        assert "\n" not in str(refusal.value)
    path.unlink()
    with pytest.raises(ArtefactError):
        bundle.load(tmp_path / "b")


def test_manifest_cannot_reach_outside_the_bundle(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(tiny_checkpoint, tmp_path / "b")
    outside = tmp_path / "b" / "chat.json"
    outside.rename(tmp_path / "chat.json")
    (tmp_path / "b" / "chat.json").symlink_to(tmp_path / "chat.json")
    with pytest.raises(ArtefactError, match="plain file"):
        bundle.load(tmp_path / "b")
