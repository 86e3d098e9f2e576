"""The verbs `targets` and `build`: the table of targets, building an engine without a GPU, and refusals."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.stranger import Refused, run
from merino_edge import bundle, engine_store, tensorrt_library
from merino_edge.engine_store import add_stored, engines_of
from merino_edge.errors import UnsupportedError
from merino_edge.export.targets import PLATFORMS
from merino_edge.jetson import engine_build
from merino_edge.jetson.device.card import device_card
from merino_edge.runtime import memory, thread_tuning
from merino_edge.runtime.engines import tensorrt_engine
from merino_edge.runtime.thread_tuning import Tuning
from merino_edge.tensorrt_library import RTX


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine store of the test's own."""
    folder = tmp_path_factory.mktemp("engines")
    monkeypatch.setenv("MERINO_ENGINES", str(folder))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's compiler for RTX takes a capability by name, so it needs no GPU to compile for the one that is named."""
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: "SM86")
    monkeypatch.setattr(tensorrt_engine, "gpu_capability", lambda: "SM86")


@pytest.fixture(scope="module")
def rtx_bundle(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    out = tmp_path_factory.mktemp("rtx") / "bundle"
    options = ("--target", "rtx", "--precision", "fp16", "--context", "32,16", "--threads", 1)
    assert run("export", good / "checkpoint", *options, "--out", out) == 0
    return out


def test_targets_are_listed_with_what_breaks_on_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("targets") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PLATFORMS)
    assert all(line in shown for platform in PLATFORMS.values() for line in platform.known_issues)
    assert run("targets", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["targets"]] == list(PLATFORMS)
    assert found["operators"]["TensorScatter"] == "10.15"


def test_engines_for_this_gpu_are_kept_outside_a_bundle_that_may_be_read_only(
    rtx_bundle: Path, gpu: None, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    mine = shutil.copytree(rtx_bundle, tmp_path / "bundle")
    files = {path.name: path.stat().st_mtime_ns for path in mine.iterdir()}
    assert run("build", mine, "--json") == 0
    said = json.loads(capfd.readouterr().out)
    assert said["out"] == str(store)
    assert {path.name: path.stat().st_mtime_ns for path in mine.iterdir()} == files
    found = engines_of(bundle.load(mine))
    assert sorted(engine.entry["context"] for engine in found) == [16, 32]
    assert {store / entry["file"] for entry in said["engines"]} == {engine.path for engine in found}
    assert all(entry["peak_memory_bytes"] >= 0 and entry["capability"] == "SM86" for entry in said["engines"])
    for engine in found:
        engine.check()
    ask = ("generate", mine, "--raw", "--prompt", "Once", "--max-tokens", 2, "--greedy")
    found[-1].path.write_bytes(b"something else")
    assert "altered; build it again" in refused(*ask)
    assert run("build", mine) == 0  # which mends it
    shutil.rmtree(store)
    capfd.readouterr()
    assert run(*ask) == 0
    assert f"running on the CPU; on the board: merino-edge build {mine}" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "1.0.0"}, "was built by TensorRT 1.0.0, not "),
        ({"capability": "SM110"}, "has engines for SM110, this GPU is SM86"),
        ({"machine": {"module": "p3767-0005", "power_mode": "pmode:0001"}}, "engine built on"),
        ({"machine": None}, "engine built on TensorRT None"),
    ],
)
def test_an_engine_of_the_store_from_another_release_gpu_or_board_says_so(
    rtx_bundle: Path, gpu: None, store: Path, capfd: pytest.CaptureFixture[str], change: dict[str, object], says: str
) -> None:
    loaded = bundle.load(rtx_bundle)
    files, trt = loaded.manifest["files"], tensorrt_library.load(RTX)[0]
    entry = {"library": RTX, "version": trt.__version__, "capability": "SM86", "machine": device_card(), "context": 32}
    entry |= {"onnx_sha256": files["model.onnx"]["sha256"], **change}
    add_stored(store, loaded.graph_sha256(32), b"no plan", entry)
    assert run("generate", rtx_bundle, "--raw", "--prompt", "Once", "--max-tokens", 2) != 0  # the plan is none
    said = " ".join(capfd.readouterr().err.split())
    assert says in said and f"build it again: merino-edge build {rtx_bundle}" in said
    assert ("power mode pmode:0001" in said) == bool(change.get("machine"))


def test_a_store_that_cannot_be_written_is_refused_before_the_compiler_starts(
    rtx_bundle: Path, gpu: None, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine_build, "build_engine", lambda *arguments, **more: pytest.fail("it compiles"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path / "file"))
    assert "set MERINO_ENGINES to a folder that you may write" in refused("build", rtx_bundle)
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path))
    monkeypatch.setattr(engine_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert re.search(r"engines need about \d+ MB in .*, 0 MB are free; free the disk", refused("build", rtx_bundle))


def test_a_compiler_that_gets_no_memory_is_told_from_one_that_refuses(
    rtx_bundle: Path, gpu: None, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object, **more: object) -> None:
        raise UnsupportedError("TensorRT cannot compile the graph: [defaultAllocator.cpp] Out of memory", "a hint")

    monkeypatch.setattr(engine_build, "build_engine", no_memory)
    said = refused("build", rtx_bundle)
    assert "error 12" in said and "MB are free" in said and "--workspace-mb 256" in said and "a hint" not in said


def test_engines_for_a_named_gpu_are_stored_in_the_bundle_and_replace_those_before(
    rtx_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copytree(rtx_bundle, tmp_path / "bundle")
    files = {path.name for path in mine.iterdir()}
    for _ in range(2):
        assert run("build", mine, "--capability", "SM86", "--json") == 0
    assert run("build", mine, "--capability", "SM89") == 0
    said = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "}")
    opened = bundle.load(mine)
    assert opened.contexts == [16, 32]
    found = [(engine["capability"], engine["context"]) for engine in opened.engines]
    assert found == [("SM86", 32), ("SM86", 16), ("SM89", 32), ("SM89", 16)]
    assert {path.name for path in mine.iterdir()} == files | {engine["file"] for engine in opened.engines}
    assert said["engines"] == opened.engines[:2]
    for engine, graph, longest in zip(opened.engines[:2], ("model.onnx", "model-16.onnx"), (32, 16), strict=True):
        assert engine["profiles"] == [[1, 1, 2], [1, longest, longest]]
        assert engine["onnx_sha256"] == opened.manifest["files"][graph]["sha256"]
        assert engine["layers"]["KV_CACHE_UPDATE"] == 2 * opened.architecture.layers
        assert engine["library"] == RTX and engine["bytes"] == (mine / engine["file"]).stat().st_size
    (mine / engine["file"]).write_bytes(b"something else")
    assert run("show", mine) == 3


def test_for_onnx_runtime_the_best_threads_are_measured_and_kept(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copytree(good / "bundle", tmp_path / "bundle")
    assert run("build", mine, "--json") == 0
    (kept,) = bundle.load(mine).tunings
    assert json.loads(capsys.readouterr().out) == {"out": str(mine), "tuning": kept}
    found = thread_tuning.candidate_tunings(kept["cores"])
    assert list(kept["answer_ms"]) == [str(possibility) for possibility in found]
    assert Tuning(kept["threads"], kept["spinning"]) in found
    assert run("bench", mine, "-p", 4, "-n", 2, "--json") == 0
    (card,) = json.loads(capsys.readouterr().out)["bundles"].values()
    assert card["threads"] == kept["threads"]
    assert run("build", mine) == 0  # a second tuning replaces the first
    assert len(bundle.load(mine).tunings) == 1
    assert capsys.readouterr().out.count("kept in the bundle") == 1
    assert run("show", mine) == 0
    assert f"cores of {kept['cpu']}" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_built_is_refused(good: Path, rtx_bundle: Path, refused: Refused, tmp_path: Path) -> None:
    assert "needs no compilation" in refused("build", good / "bundle", "--capability", "SM86")
    assert "has no kernels for SM87" in refused("build", rtx_bundle, "--capability", "SM87")
    assert "workspace-mb" in refused("build", rtx_bundle, "--capability", "SM86", "--workspace-mb", 0)
    assert not bundle.load(rtx_bundle).engines


@pytest.mark.parametrize(
    ("peaks", "says"),  # 500 MB are estimated
    [
        ([10**12], "500 MB and up to"),
        ([10**6], "500 MB and up to"),
        ([10**9, None], "500 MB and up to"),
        (["much"], "500 MB and up to"),
        ([900_000_000, 600_000_000], "600 MB with its workspace;"),
    ],
)
def test_the_last_build_s_memory_counts_where_it_is_near_the_estimate(
    rtx_bundle: Path, tmp_path: Path, peaks: list[object], says: str
) -> None:
    loaded = bundle.load(shutil.copytree(rtx_bundle, tmp_path / "bundle"))
    for number, peak in enumerate(peaks):
        entry = {"library": RTX, "peak_memory_bytes": peak}
        loaded = bundle.add_engine(loaded, f"plan {number}".encode(), entry, lambda old: False)
    assert f"needs about {says}" in str(engine_build.plan_build(loaded, "SM86"))


def test_a_bundle_that_must_hold_its_engines_but_is_read_only_is_to_be_copied(
    rtx_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(engine_store.tempfile, "TemporaryFile", read_only)
    said = refused("build", rtx_bundle, "--capability", "SM86")
    assert "(Read-only file system); copy the bundle to a folder that you may write" in said
    assert "MERINO_ENGINES" not in said


def test_a_build_that_would_not_fit_into_memory_does_not_start(
    rtx_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    kilobytes = {"MemAvailable": 400_000, "SwapFree": 0, "CmaFree": 100_000}
    for module in (engine_build, memory):
        monkeypatch.setattr(module, "meminfo_bytes", lambda field, root="/": 1000 * kilobytes[field])
    said = refused("build", rtx_bundle, "--capability", "SM86")
    assert re.search(r"building needs about 50\d MB, 300 MB are free \(100 MB more only in CMA\) .*; .*add swap", said)
    assert not bundle.load(rtx_bundle).engines


def test_a_bundle_runs_on_the_engine_in_it_and_says_why_it_cannot(
    rtx_bundle: Path, refused: Refused, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = shutil.copytree(rtx_bundle, tmp_path / "bundle")
    ask = ("generate", mine, "--raw", "--prompt", "Once", "--max-tokens", 2, "--greedy")
    again = f"merino-edge build {mine}"
    assert run(*ask) == 0  # no engine yet
    assert f"running on the CPU; on the board: {again}" in " ".join(capfd.readouterr().err.split())
    assert run("build", mine, "--capability", "SM86") == 0
    entry = {key: value for key, value in bundle.load(mine).engines[-1].items() if key != "file"}
    capfd.readouterr()
    assert run(*ask, "--cpu") == 0
    assert "engine" not in capfd.readouterr().err
    for change, reason in (
        ({"version": "1.0.0"}, "was built by TensorRT 1.0.0, not "),
        ({"onnx_sha256": "0" * 64}, "was built from another graph"),
        ({"context": 31}, "has the unknown context 31"),
        ({"library": "sys"}, "is of the unknown library 'sys'"),
    ):
        loaded = bundle.load(mine)
        bundle.add_engine(loaded, b"a plan", {**entry, **change}, lambda old: True)
        assert reason in (said := refused(*ask)) and said.endswith(again)
    elsewhere = {**entry, "machine": {**entry["machine"], "module": "p3767-0005"}}
    bundle.add_engine(bundle.load(mine), b"no plan", elsewhere, lambda old: True)
    assert run(*ask) != 0  # no GPU, or no plan
    said = " ".join(capfd.readouterr().err.split())
    assert "warning: engine built on module p3767-0005, here unknown; build it again: " + again in said
    bundle.add_engine(bundle.load(mine), b"ours", entry, lambda old: False)
    bundle.add_engine(bundle.load(mine), b"no plan", elsewhere, lambda old: False)
    assert run(*ask) != 0
    assert "warning" not in capfd.readouterr().err  # one engine was built on this machine


def test_an_interrupted_build_leaves_the_bundle_as_it_was(
    rtx_bundle: Path, tmp_path: Path, merino: tuple[str, ...]
) -> None:
    mine = shutil.copytree(rtx_bundle, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    process = subprocess.Popen(
        [*merino, "build", str(mine), "--capability", "SM86"], stdout=-1, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.readline()  # the plan; the compiler starts after it
    process.terminate()
    rest = process.communicate(timeout=120)[1]
    # If the signal comes while the library is imported, Python ends itself by SIGINT. For a shell that is 130 too.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in rest and rest.endswith("merino-edge: interrupted\n")
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_the_commands_of_the_documentation(repository: Path, rtx_bundle: Path, tmp_path: Path) -> None:
    text = (repository / "docs/export.md").read_text()
    commands = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("merino-edge ")]
    commands = [command for command in commands if not command[0].startswith("export")]  # tested by themselves
    assert [command[0] for command in commands] == ["targets", "targets", "build", "build"]
    mine = shutil.copytree(rtx_bundle, tmp_path / "bundle")
    for command in commands:
        code = run(*[mine if word == "BUNDLE" else word for word in command])
        assert code == 0 or (command == ["build", "BUNDLE"] and code in (7, 8))  # without a GPU it is refused
    named = set(re.findall(r"`((?:jetpack|tensorrt|rtx|onnxruntime)[-.0-9a-z]*)`", text))
    assert named == set(PLATFORMS)
