"""A profile on TensorRT: NVIDIA's compiler compiles each model once, and ONNX Runtime runs the steps without a GPU."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.export.targets import PLATFORMS
from merino_edge.export.tensorrt import Engine, build_engine, default_lowering
from merino_edge.jetson.profiler import compiled_models, profiler
from merino_edge.jetson.profiler.backends import BACKENDS, Backend
from merino_edge.jetson.profiler.compiled_models import CompiledModels
from merino_edge.jetson.profiler.profiler import Progress, Request
from merino_edge.jetson.profiler.random_graph import random_graph
from merino_edge.latency.table import LatencyTable
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.search import space_file
from merino_edge.search.space import Space
from merino_edge.tensorrt_library import RTX, TENSORRT
from merino_edge.weights import random_weights

SMALL = Architecture(40, 16, 64, 32, (Block(64, 1, 2, 1, 64),))
NO_NATIVE = Architecture(40, 16, 24, 12, (Block(24, 1, 2, 2, 24),))  # NVIDIA's compiler cannot lay out its attention


_compiled: dict[tuple[Any, ...], Engine] = {}


def _compiled_once(*arguments: Any, **memory: Any) -> Engine:
    if arguments not in _compiled:
        _compiled[arguments] = build_engine(*arguments, **memory)
    return _compiled[arguments]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of engines. NVIDIA's compiler runs once for each graph: its answer is handed to later tests again."""
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    monkeypatch.setattr(compiled_models, "build_engine", _compiled_once)
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path / "engines"))
    return tmp_path / "engines"


def backend_of(models: CompiledModels) -> Backend:
    """The backend with NVIDIA's compiler, whose engines are then run by ONNX Runtime from the same graph."""

    def open_engine(a: Architecture, precision: str, threads: int) -> OnnxEngine:
        assert models.plan(a, precision)
        return OnnxEngine(random_graph(a, precision, "rtx", models.lowering(precision)), a, a.max_positions, 1)

    return dataclasses.replace(BACKENDS["tensorrt-rtx"], open=open_engine, models=lambda: models)


def run(path: Path, space: Space, models: CompiledModels, *, resume: bool = False, **options: Any) -> LatencyTable:
    return profiler.profile(path, request_of(space, models, **options), resume=resume)


def request_of(space: Space, models: CompiledModels, *, only: str = "width_change decode") -> Request:
    return Request(space, space_file.to_dict(space), "fp16", 1, backend_of(models), 1.0, only=only)


@pytest.mark.usefixtures("hasty_clock")
def test_each_model_is_compiled_once_on_a_machine(folder: Path, tmp_path: Path, tiny_space: Space) -> None:
    models = CompiledModels(RTX, "SM86")
    table = run(tmp_path / "one.jsonl", tiny_space, models)
    assert table.measurements and not table.failed and not models.warnings
    assert table.header["lowering"] == "native"
    files = list((folder / "profile").iterdir())
    assert models.compiled == len(files) > 3
    again = CompiledModels(RTX, "SM86")
    assert run(tmp_path / "two.jsonl", tiny_space, again).measurements and again.compiled == 0
    other = CompiledModels(RTX, "SM89")  # of another GPU
    a = max((file.stat().st_size, file) for file in files)[1]
    assert not other.is_compiled(SMALL, "fp16") and a.name.split("-")[1] == "SM86"


@pytest.mark.usefixtures("hasty_clock")
def test_a_full_cache_folder_is_a_warning(folder: Path, tmp_path: Path, tiny_space: Space) -> None:
    folder.mkdir()
    (folder / "profile").write_text("no folder")
    models = CompiledModels(RTX, "SM86")
    table = run(tmp_path / "t.jsonl", tiny_space, models)
    assert table.measurements and not table.failed
    (warning,) = models.warnings
    assert "engines are not kept" in warning and str(folder) in warning and "\n" not in warning
    assert models.compiled == len(models._held) > 3  # once each all the same


def test_a_disk_is_not_filled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_models, "SPARE_BYTES", 10**18)
    monkeypatch.setattr(compiled_models, "HELD_BYTES", 1)
    models = CompiledModels(RTX, "SM86")
    for _ in range(2):
        assert models.plan(SMALL, "fp16")
    assert models.compiled == 2 and "GB free" in models.warnings[0]
    assert not list((folder / "profile").iterdir())


def test_beyond_the_store_s_limit_engines_of_earlier_profiles_are_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERINO_ENGINES_GB", "0.00001")
    (folder / "profile").mkdir(parents=True)
    others = [folder / "profile" / "of-another-profile.engine", folder / "of-a-bundle.plan"]
    for other in others:
        other.write_bytes(bytes(20_000))
    models = CompiledModels(RTX, "SM86")
    for a in (SMALL, dataclasses.replace(SMALL, vocab_size=41), SMALL):
        assert models.plan(a, "fp16")
    assert models.compiled == 2 == len(list((folder / "profile").iterdir()))
    assert [other.exists() for other in others] == [False, True]
    assert models.warnings == ["engines of earlier profiles were removed: the store is full (MERINO_ENGINES_GB)"]


def test_a_damaged_or_foreign_engine_is_compiled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = CompiledModels(RTX, "SM86")
    plan, seconds = models.plan(SMALL, "fp16"), models.seconds(SMALL, "fp16")
    (file,) = (folder / "profile").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole.replace(b'"graph_sha256":"', b'"graph_sha256":"0'), b"", b"\n", b"{}\n"):
        file.write_bytes(damaged)
        again = CompiledModels(RTX, "SM86")
        assert len(again.plan(SMALL, "fp16")) == len(plan) and again.compiled == 1
    kept = CompiledModels(RTX, "SM86")
    assert kept.is_compiled(SMALL, "fp16") and abs(kept.seconds(SMALL, "fp16") - seconds) < 60 and kept.compiled == 0


def test_the_primitive_lowering_answers_where_the_native_one_does_not_compile(folder: Path) -> None:
    models = CompiledModels(RTX, "SM86")
    assert models.lowering("fp16") == "native" and models.lowering("fp32") == "primitive"
    models.choose_lowering(NO_NATIVE, "fp16")
    assert models.lowering("fp16") == "primitive" and models.plan(NO_NATIVE, "fp16")
    assert (
        models.warnings[0].startswith("measuring the primitive lowering: TensorRT") and "\n" not in models.warnings[0]
    )
    models.choose_lowering(SMALL, "fp16", "native")  # as the table was begun
    assert models.lowering("fp16") == "native"
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="cannot compile the graph"):
            models.plan(NO_NATIVE, "fp16")
    assert models.plan(SMALL, "fp32")


def test_a_compiler_without_memory_is_tried_again_and_chooses_no_lowering(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise UnsupportedError("TensorRT cannot compile the graph: [defaultAllocator.cpp] Out of memory", "a hint")

    models = CompiledModels(RTX, "SM86")
    with monkeypatch.context() as patch:
        patch.setattr(compiled_models, "build_engine", no_memory)
        with pytest.raises(
            UnsupportedError, match=r"Out of memory.*MB are free.*; close programs or reboot"
        ) as refusal:
            models.choose_lowering(SMALL, "fp16")
    assert "a hint" not in str(refusal.value) and models.lowering("fp16") == "native"
    assert not models.is_compiled(SMALL, "fp16")
    models.choose_lowering(SMALL, "fp16")  # memory is free again
    assert models.is_compiled(SMALL, "fp16") and not models.warnings


def tables(model: onnx.ModelProto) -> dict[str, int]:
    """The bytes of the embedding and the head, or of their pieces."""
    found = (tensor for tensor in model.graph.initializer if "embedding" in tensor.name or "head" in tensor.name)
    return {tensor.name: onnx.numpy_helper.to_array(tensor).nbytes for tensor in found}


@pytest.mark.parametrize(
    ("version", "target"),
    [("10.0", "jetpack-6.2"), ("10.3.0", "jetpack-6.2"), ("10.13.3.9", "jetpack-7.1"), ("10.16.2.10", "jetpack-7.2")],
)
def test_a_large_head_is_profiled_in_the_pieces_that_export_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, target: str
) -> None:
    monkeypatch.setattr(tensorrt_library, "load", lambda library: (SimpleNamespace(__version__=version), None))
    for name, platform in PLATFORMS.items():
        small_limit = 2000 if platform.largest_weight_bytes else None
        monkeypatch.setitem(PLATFORMS, name, dataclasses.replace(platform, largest_weight_bytes=small_limit))
    graphs: list[onnx.ModelProto] = []

    def refuse(library: str, graph: bytes, *arguments: object, **options: object) -> None:
        graphs.append(onnx.load_from_string(graph))
        raise UnsupportedError("TensorRT cannot compile the graph")

    monkeypatch.setattr(compiled_models, "build_engine", refuse)
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path))
    with pytest.raises(UnsupportedError):
        CompiledModels(TENSORRT, "SM87").plan(SMALL, "fp16")
    exported = build_model(SMALL, random_weights(SMALL), "fp16", SMALL.max_positions, target)
    assert tables(graphs[0]) == tables(onnx.load_from_string(to_bytes(exported)))
    assert (max(tables(graphs[0]).values()) <= 2000) == (target == "jetpack-6.2")


@pytest.mark.parametrize(
    ("version", "lowering"),
    [("10.3.0", "primitive"), ("10.13.3.9", "primitive"), ("10.16.2.10", "native"), ("11.0", "native")],
)
def test_the_lowering_follows_the_release(monkeypatch: pytest.MonkeyPatch, version: str, lowering: str) -> None:
    monkeypatch.setattr(tensorrt_library, "load", lambda library: (SimpleNamespace(__version__=version), None))
    assert [default_lowering(TENSORRT, p) for p in ("int4", "fp32")] == [lowering, "primitive"]


@pytest.mark.usefixtures("hasty_clock")
def test_the_estimate_counts_what_is_still_to_compile(folder: Path, tiny_space: Space, tmp_path: Path) -> None:
    models = CompiledModels(RTX, "SM86")
    prepared = profiler.prepare(request_of(tiny_space, models))
    left = prepared.to_compile(prepared.batches())
    distinct = {a for probe in prepared.plan.probes for a in probe.models} | {prepared.timer.reference_model}
    assert models.compiled + len(left) == len(distinct) and models.compiled == 2  # the smallest and the largest
    seconds = prepared.compile_seconds(left)
    least = len(left) * prepared.estimate.compile_s  # where size costs nothing, the sum differs from it by rounding
    assert prepared.estimate.compile_s > 0.1 and seconds >= least * (1 - 1e-9)
    assert prepared.seconds > seconds
    assert left[0].parameters == max(a.parameters for a in left)
    for a in left[-2:]:
        models.plan(a, "fp16")
    again = profiler.prepare(request_of(tiny_space, CompiledModels(RTX, "SM86")))
    assert len(again.to_compile(again.batches())) == len(left) - 2
    assert again.estimate.compile_s == prepared.estimate.compile_s  # of the first run, not of reading a file


@pytest.mark.usefixtures("hasty_clock")
def test_the_compiler_has_all_cores(folder: Path, tiny_space: Space, tmp_path: Path) -> None:
    cores, seen, models = os.sched_getaffinity(0), [], CompiledModels(RTX, "SM86")

    def look(progress: Progress) -> None:
        seen.append((progress.to_compile > 0, os.sched_getaffinity(0)))

    profiler.profile(tmp_path / "t.jsonl", request_of(tiny_space, models), on_progress=look)
    assert {compiling for compiling, _ in seen} == {True, False}
    assert all(allowed == cores for _, allowed in seen)
