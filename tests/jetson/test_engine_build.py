"""A build compiles the primitive graphs where NVIDIA's compiler does not take the native ones. No GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.random_model import random_model
from merino_edge import bundle, checkpoint, tensorrt_library
from merino_edge.architecture import Architecture, Block
from merino_edge.bundle import Bundle
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.parity import TEXT
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.jetson import engine_build
from merino_edge.jetson.engine_build import build_engines, plan_build
from merino_edge.jetson.profiler.random_graph import random_graph
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tensorrt_library import RTX


def exported(folder: Path, head_dim: int, lowering: str = "") -> Bundle:
    """A bundle for `rtx` of two contexts. NVIDIA's compiler takes no native graph with heads of 12."""
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    a = Architecture(300, 64, 2 * head_dim, head_dim, (Block(2 * head_dim, 1, 2, 2, 24),))
    tokenizer = train_tokenizer(iter([TEXT]), a.vocab_size)
    more = {"tokenizer_json": tokenizer.to_str(), "chat": chat_format(), "training": {"source": "random"}}
    checkpoint.save(folder / "checkpoint", a, random_model(a), **more)
    options = ExportOptions(Target.named("rtx", "fp16", lowering), 48, smaller_contexts=(16,))
    engine = partial(lambda graph, capacity: OnnxEngine(graph, a, capacity, threads=1))
    return write_bundle(checkpoint.load(folder / "checkpoint"), folder / "bundle", options, engine)


@pytest.mark.filterwarnings("ignore")
def test_the_primitive_graphs_answer_for_native_ones_that_do_not_compile(tmp_path: Path) -> None:
    written = exported(tmp_path, 12)
    assert written.manifest["graph"]["lowering"] == "native" and written.manifest["compiled"]["lowering"] == "primitive"
    warnings: list[str] = []
    engines = build_engines(plan_build(written, "SM86"), on_warning=warnings.append)
    assert [engine.entry["lowering"] for engine in engines] == ["primitive", "primitive"]
    assert len(warnings) == 2 and all("so the primitive graph is compiled" in line for line in warnings)
    files = written.manifest["files"]
    for engine, name in zip(engines, ("model-primitive.onnx", "model-primitive-16.onnx"), strict=True):
        assert engine.entry["onnx_sha256"] == files[name]["sha256"]
        assert engine.entry["onnx_sha256"] in written.onnx_sha256s(engine.entry["context"])
    assert len(bundle.load(tmp_path / "bundle").engines) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_bundle_from_before_names_the_export_that_helps(tmp_path: Path) -> None:
    written = exported(tmp_path, 12)
    for name in ("model-primitive.onnx", "model-primitive-16.onnx"):
        del written.manifest["files"][name]
    with pytest.raises(UnsupportedError, match="cannot compile the graph") as refusal:
        build_engines(plan_build(written, "SM86"))
    assert refusal.value.hint == "export it again with --lowering primitive"


def test_native_graphs_that_compile_are_taken(tmp_path: Path) -> None:
    engines = build_engines(plan_build(exported(tmp_path, 32), "SM86"))
    assert [engine.entry["lowering"] for engine in engines] == ["native", "native"]


@pytest.mark.parametrize(("version", "lowering"), [("10.3.0", "primitive"), ("10.16.2.10", "native")])
def test_an_older_tensorrt_gets_the_primitive_graph_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, lowering: str
) -> None:
    written = exported(tmp_path, 32)
    tried: list[Path] = []

    def refuse(library: str, graph: Path, context: int, **options: object) -> None:
        tried.append(graph)
        raise UnsupportedError("Error Code 2: OutOfMemory")  # so that no other graph is tried

    monkeypatch.setattr(engine_build, "build_engine", refuse)
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM87")
    monkeypatch.setattr(tensorrt_library, "installed", lambda: "tensorrt")
    monkeypatch.setattr(tensorrt_library, "load", lambda library: (SimpleNamespace(__version__=version), None))
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path / "engines"))
    with pytest.raises(UnsupportedError):
        build_engines(plan_build(written))
    assert tried == [written.primitive_graph_of(48) if lowering == "primitive" else written.graph_of(48)]


def test_a_build_removes_what_the_store_s_limit_does_not_hold_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, store = exported(tmp_path, 32), tmp_path / "engines"
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM86")
    monkeypatch.setattr(tensorrt_library, "installed", lambda: RTX)
    monkeypatch.setenv("MERINO_ENGINES", str(store))
    monkeypatch.setenv("MERINO_ENGINES_GB", "much")
    with pytest.raises(InputError, match="MERINO_ENGINES_GB is 'much'"):
        plan_build(written)
    monkeypatch.setenv("MERINO_ENGINES_GB", "0.00001")
    (store / "of-another-bundle.plan").write_bytes(bytes(20_000))
    warnings: list[str] = []
    engines = build_engines(plan_build(written), on_warning=warnings.append)
    assert {path.name for path in store.glob("*.plan")} == {engine.path.name for engine in engines}
    assert warnings == ["the engine store is limited to 1e-05 GB (MERINO_ENGINES_GB): removed of-another-bundle.plan"]
    largest, smaller = (engine.path.stat().st_mtime_ns for engine in engines)
    assert smaller < largest  # which would leave last: it serves every length


def test_the_room_of_an_engine_holds_a_head_that_is_padded() -> None:
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    a = Architecture(40_001, 64, 512, 64, (Block(512, 1, 8, 8, 64),))
    graph = random_graph(a, "fp16", "rtx", "primitive")
    engine = build_engine(RTX, graph, 64, "SM86")
    assert 1.5 * len(graph) < len(engine.plan) < engine_build.most_engine_bytes(a, "fp16", len(graph))
