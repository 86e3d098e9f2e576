"""The report of a board: end to end with tiny models, after an interruption, without anybody's name."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.fake_driver import FakeDriver
from helpers.recorded_boards import expand
from merino_edge import artefact
from merino_edge.export.tensorrt import Engine
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.doctor.features import PROBED
from merino_edge.jetson.profiler import compiled_models
from merino_edge.jetson.profiler.backends import BACKENDS

NANO, MODE = "jetpack6-orin-nano-super", "MAXN_SUPER"
PERSON = "Quentin"


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("board_report")


@pytest.fixture
def models(script: ModuleType) -> ModuleType:
    module: ModuleType = script.board_models
    return module


def test_a_report_goes_on_after_ctrl_c_and_ends_with_one_file(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / PERSON / "report"
    folder.parent.mkdir()
    command = [sys.executable, str(repository / "benchmarks/board_report.py"), str(folder), "--tiny"]
    command += ["--backend", "onnxruntime-cpu"]
    variables = {**os.environ, "LOGNAME": PERSON, "HOME": str(folder.parent), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    doctor, deadline = folder / "tiny/steps/unknown/doctor.json", time.monotonic() + 120
    while not doctor.is_file():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and "run the same command to go on" in said
    assert not (folder / "board-report.json").exists()
    kept = doctor.stat().st_mtime_ns
    again = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert doctor.stat().st_mtime_ns == kept and "doctor: done before" in again.stdout
    told, _, _ = again.stdout.partition("wrote ")
    assert "will hold:" in told and "not in it: names of the user" in told
    document = artefact.read_json(folder / "board-report.json", "board_report")
    assert PERSON not in (folder / "board-report.json").read_text()
    (steps,) = document["modes"].values()
    assert {step["failed"] for step in steps.values()} == {""}
    assert steps["profile"]["table"][0].startswith("{") and steps["doctor"]["result"]["features"]
    for name in ("tiny-0 int4", "tiny-1 int4", "tiny-0 fp16", "tiny-1 fp16"):
        result, found = steps[name]["result"], steps[name]["predictions"]
        assert {test["kind"] for test in result["tests"] if test["tokens_per_second"] > 0} == {"prefill", "decode"}
        assert ("predicted_ms" in found["table"]["decode"]) == name.endswith("int4")
        assert "none" in found["estimate"]["decode"]  # this machine is no board


def test_a_dry_run_lists_steps_and_minutes_and_writes_nothing(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks/board_report.py"), str(tmp_path / "r"), "--dry-run"]
    done = subprocess.run([*command, "--backend", "tensorrt"], capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert len(rows) == 13 and rows[1] == " 50 min  profile" and rows[-1].startswith("about 102 min in power mode")
    assert not (tmp_path / "r").exists()


def a_step(script: ModuleType, code: str, name: str = "one") -> Any:
    return script.Step(name, "model", (sys.executable, "-c", code))


FAILURES = {
    "a refusal": ("import sys; print('noise', file=sys.stderr); sys.exit('why')", "exit code 1: noise | why"),
    "a crash": ("import os; os.abort()", "ended by SIGABRT"),
    "no JSON": ("print('hello')", "exit code 0"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_step_that_fails_says_why_and_is_tried_again(script: ModuleType, tmp_path: Path, case: str) -> None:
    code, why = FAILURES[case]
    report = script.Report(tmp_path, "onnxruntime-cpu")
    step = a_step(script, code)
    assert not report.run(step) and report.result("one", step.command) is None
    assert report.contents()["modes"][report.mode]["one"]["failed"].startswith(why)
    good = a_step(script, "print('{}')")
    assert report.run(good) and report.result("one", good.command) == {}
    assert report.result("one", step.command) is None  # it was another command


def test_a_step_that_hangs_is_given_up(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(script.MOST_HOURS, "model", 1 / 3600)
    report = script.Report(tmp_path, "onnxruntime-cpu")
    assert not report.run(a_step(script, "import time; time.sleep(60)"))
    assert "SIGKILL" in report.contents()["modes"][report.mode]["one"]["failed"]


def test_a_damaged_step_is_done_again(script: ModuleType, tmp_path: Path) -> None:
    report, step = script.Report(tmp_path, "onnxruntime-cpu"), a_step(script, "print('{\"value\": 1}')")
    assert report.run(step) and report.result("one", step.command) == {"value": 1}
    path = report.path_of("one")
    path.write_text(path.read_text().replace('"value": 1', '"value": 2'))
    assert report.result("one", step.command) is None and report.contents()["modes"] == {}


def test_each_power_mode_has_its_own_steps(script: ModuleType, tmp_path: Path) -> None:
    root = expand(NANO, tmp_path / "root")
    report = script.Report(tmp_path / "report", "onnxruntime-cpu", root=root)
    assert report.mode == MODE and report.run(a_step(script, "print('{}')", "doctor"))
    (root / "var/lib/nvpmodel/status").write_text("pmode:0001 fmode:quiet\n")
    other = script.Report(tmp_path / "report", "onnxruntime-cpu", root=root)
    assert other.mode == "25W" and other.result("doctor") is None and other.run(a_step(script, "print('{}')", "doctor"))
    contents = other.contents()
    assert set(contents["modes"]) == {MODE, "25W"}
    assert [mode["name"] for mode in contents["power_modes"]["all"]] == ["15W", "25W", MODE]
    words = {str(word) for step in other.steps() for word in step.command}
    assert not words & {"sudo", "nvpmodel", "jetson_clocks"}


WORKS = {
    (): "onnxruntime-cpu",
    ("CUDA on the GPU",): "onnxruntime-cpu",
    ("TensorRT",): "onnxruntime-cpu",  # without a GPU
    ("CUDA on the GPU", "TensorRT", "ONNX Runtime on CUDA"): "tensorrt",
    ("CUDA on the GPU", "TensorRT for RTX"): "tensorrt-rtx",
    ("CUDA on the GPU", "ONNX Runtime on CUDA"): "onnxruntime-cuda",
}


@pytest.mark.parametrize("on", WORKS, ids=lambda on: ", ".join(on) or "nothing")
def test_the_backend_is_what_the_doctor_found(script: ModuleType, tmp_path: Path, on: tuple[str, ...]) -> None:
    features = {name: {"on": name in on, "why": ""} for name in PROBED}
    report = script.Report(tmp_path)
    report.run(a_step(script, f"print({json.dumps({'features': features})!r})", "doctor"))
    assert report.backend == WORKS[on]
    assert script.Report(tmp_path, "torch-cuda").backend == "torch-cuda"


# --- models and predictions ---------------------------------------------------------------------------


def test_five_models_fit_a_small_board(models: ModuleType) -> None:
    architectures = [models.architecture(name) for name in models.MODELS]
    assert len(architectures) == 5 and {a.max_positions for a in architectures} == {models.CONTEXT}
    assert max(a.weight_bytes("fp16") for a in architectures) < 0.4e9
    sizes = {name: round(a.parameters / 1e6) for name, a in zip(models.MODELS, architectures, strict=True)}
    assert sizes["edge-20m"] == 20 and sizes["edge-67m"] == 67


def test_the_estimate_stands_beside_what_was_measured(models: ModuleType, tmp_path: Path) -> None:
    card = device_card(expand(NANO, tmp_path))
    a = models.architecture("smollm2-135m")
    tests = [{"kind": "decode", "p50_ms": 8.0}, {"kind": "prefill", "p50_ms": 30.0}]
    measured = {"architecture": a.to_dict(), "precision": "int4", "tests": tests}
    found = models.predictions(measured, card, MODE, None)
    decode = found["estimate"]["decode"]
    assert 2 < decode["predicted_ms"] < 20
    assert decode["error_percent"] == pytest.approx(100 * (decode["predicted_ms"] / 8 - 1))
    slower = models.predictions(measured, card, "15W", None)["estimate"]["decode"]["predicted_ms"]
    assert slower > decode["predicted_ms"]
    assert "no table" in found["table"]["decode"]["none"]
    assert "power mode" in models.predictions(measured, card, "unknown", None)["estimate"]["decode"]["none"]
    assert "no board" in models.predictions(measured, device_card(os.devnull), MODE, None)["estimate"]["decode"]["none"]


def test_a_model_is_measured_through_tensorrt(
    models: ModuleType, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def in_place_of_the_compiler(library: str, graph: bytes, context: int, capability: str, **more: Any) -> Engine:
        assert context == models.CONTEXT
        return Engine(graph, library, "0", capability, 0.5, Counter(), [], b"", len(graph), 0)

    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path))
    monkeypatch.setattr(compiled_models, "build_engine", in_place_of_the_compiler)
    cached: Any = BACKENDS["tensorrt"].models
    cached.cache_clear()
    try:
        found = models.measure("tiny-0", "fp16", "tensorrt", 2, 0.0)
    finally:
        cached.cache_clear()  # it belongs to the stand-in
    assert found["threads"] is None and gpu.count("cuGraphLaunch") > models.STEPS
    assert [len(test["samples"]) for test in found["tests"]] == [2, 2]
    assert len(list((tmp_path / "profile").glob("*.engine"))) == 1


def test_energy_is_that_of_decode_steps(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib
    from types import SimpleNamespace

    class Meter:
        @staticmethod
        def of() -> Any:
            return Meter()

        @contextlib.contextmanager
        def measuring(self) -> Any:
            used = SimpleNamespace(energy_mj=None, seconds=0.0)
            yield used
            used.energy_mj, used.seconds = 640.0, 0.1

    monkeypatch.setattr(models, "EnergyMeter", Meter)
    monkeypatch.setattr(models, "run_once", lambda engine, case: [])
    found = models._energy(None, models.Case("decode", 32), 0.0)
    assert found == {"tokens": 32, "seconds": 0.1, "tokens_per_joule": 50.0, "watts": pytest.approx(6.4)}


# --- names ---------------------------------------------------------------------------------------------


def test_nothing_names_the_person_or_the_machine(script: ModuleType, tmp_path: Path) -> None:
    module = importlib.import_module("without_names")
    names = module.Names(
        {"/data/q/report": "REPORT", "/home/q": "~"}, {"orin-7": "HOST", "q": "USER", "1424": "SERIAL"}
    )
    texts = {
        "/home/q/.cache/engines": "~/.cache/engines",
        "/data/q/report/kept": "REPORT/kept",
        "/home/anna/x and /home/anna": "/home/USER/x and /home/USER",
        "Linux orin-7 q: seq 14240, sn 1424": "Linux HOST USER: seq 14240, sn SERIAL",
        "48:b0:2d:aa:BB:cc at 192.168.1.7": "ADDRESS at ADDRESS",
        "TensorRT 10.3.0.30": "TensorRT 10.3.0.30",
    }
    assert names.removed_from({"a": [*texts], "b": ({"q": 1.5, "c": None},)}) == {
        "a": [*texts.values()],
        "b": [{"q": 1.5, "c": None}],
    }


def test_the_names_are_read_from_the_machine(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("without_names")
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/serial-number").write_text("1424922\0")
    monkeypatch.setenv("LOGNAME", PERSON)
    monkeypatch.setattr(module.platform, "node", lambda: "kitchen.lan")
    names = module.Names.of_this_machine(tmp_path / "out", tmp_path)
    text = f"{PERSON} on kitchen.lan and kitchen, 1424922, {tmp_path}/out/x, {Path.home()}/y"
    shown = names.removed_from(text)
    assert shown == f"USER on HOST and HOST, SERIAL, REPORT/x, {'~' if str(Path.home()) != '/' else ''}/y"
    monkeypatch.setenv("LOGNAME", "nvidia")  # the first user of many boards
    assert "nvidia" not in module.Names.of_this_machine(tmp_path, tmp_path).words
