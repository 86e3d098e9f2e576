"""The questions to a first GPU: right on the strict stand-in for the driver, and a no where what they ask is broken."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from helpers.fake_driver import FakeDriver, load_driver
from merino_edge.errors import UnsupportedError
from merino_edge.runtime.cuda import cuda as calls
from merino_edge.runtime.cuda import provider
from merino_edge.runtime.engines import kv_scatter_kernel, topk_kernel


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("first_gpu")


def asked(script: ModuleType, part: str) -> dict[str, Any]:
    (question,) = (question for question in script.QUESTIONS if part in question.name)
    line: dict[str, Any] = script.answered(question)
    assert list(line) == ["question", "answer", "detail", "seconds"] and "\n" not in line["detail"]
    return line


RIGHT = ("CUDA opens", "KV scatter", "top-k", "recorded", "replay", "thread", "out of memory", "200 opens", "provider")


@pytest.mark.parametrize("part", RIGHT)
def test_on_the_stand_in_the_answer_is_yes(script: ModuleType, gpu: FakeDriver, package: str, part: str) -> None:
    line = asked(script, part)
    assert line["answer"] == "yes", line["detail"]


def test_what_a_graph_refuses_is_told(script: ModuleType, gpu: FakeDriver, package: str) -> None:
    took, _, refused = asked(script, "recorded")["detail"].partition("; refused: ")
    assert took == "recorded: copy from pinned, copy to pinned, kernel, 2D copy, kernel that never ran"
    assert refused == "copy from pageable, copy to pageable, allocation, pinned allocation, waiting"


def test_times_are_a_figure(script: ModuleType, gpu: FakeDriver) -> None:
    from gpu_questions import kernel_questions

    answer = kernel_questions.times(steps=2)
    assert answer.answer > 0 and "60 rows, copies" in answer.detail


# --- a no for each way in which the code may be broken ------------------------------------------------


def other_source(kernel: ModuleType, old: str, new: str) -> Callable[[Any, FakeDriver], None]:
    """A kernel that does something else."""

    def breaks(monkeypatch: Any, driver: FakeDriver) -> None:
        assert old in kernel.SOURCE
        driver.add_kernel(kernel.SOURCE.replace(old, new), kernel.NAME)

    return breaks


def other_method(name: str, method: Callable[..., Any]) -> Callable[[Any, FakeDriver], None]:
    return lambda monkeypatch, driver: monkeypatch.setattr(calls.Cuda, name, method)


@contextlib.contextmanager
def never_active(cuda: calls.Cuda) -> Iterator[None]:
    """Current on the main thread only."""
    import threading

    with real_active(cuda) if threading.current_thread() is threading.main_thread() else contextlib.nullcontext():
        yield


def stays_open(cuda: calls.Cuda) -> None:
    still_open.append(cuda)


def broken_after_refusal(cuda: calls.Cuda, size: int) -> int:
    if getattr(cuda, "refused", False):
        raise UnsupportedError("it stays", "")
    cuda.refused = size > 2**40  # type: ignore[attr-defined]
    return int(real_allocate(cuda, size))


def unchecked(cuda: calls.Cuda, size: int) -> int:
    return int(real_allocate(cuda, min(size, 4000)))


def untyped(cuda: calls.Cuda, size: int) -> int:
    if size > 2**40:
        raise RuntimeError("out of memory")
    return int(real_allocate(cuda, size))


def stays_in_capture(cuda: calls.Cuda, work: Callable[[], None]) -> Any:
    """As `recorded` without its way out."""
    try:
        cuda._provider.begin_capture(cuda.stream)
        work()
        return cuda._provider.end_capture(cuda.stream)
    except UnsupportedError:
        return None


def runs_at_once(cuda: calls.Cuda, work: Callable[[], None]) -> Any:
    """A graph that does what the step did when it was recorded, and nothing later."""
    work()
    cuda.synchronize()
    return real_recorded(cuda, lambda: None)


def lame_provider(monkeypatch: Any, driver: FakeDriver) -> None:
    def refuse(package: str = "") -> Any:
        raise UnsupportedError("this package does not load", "")

    monkeypatch.setattr(provider, "open_provider", refuse)


still_open: list[calls.Cuda] = []
real_active, real_close, real_allocate = calls.Cuda.active, calls.Cuda.close, calls.Cuda.allocate
real_recorded, real_to_device = calls.Cuda.recorded, calls.Cuda.to_device
scatter, largest = kv_scatter_kernel, topk_kernel
nothing = other_method("to_host", lambda cuda, address, array: None)
never_recorded = other_method("recorded", lambda cuda, work: None)
BROKEN: dict[str, tuple[str, Callable[[Any, FakeDriver], None]]] = {
    "copies do nothing": ("CUDA opens", nothing),
    "a row beside its place": ("KV scatter", other_source(scatter, "+ position[0]", "+ (position[0] ? 1 : 0)")),
    "a row without its end": ("KV scatter", other_source(scatter, "i < words", "i < words - 1")),
    "one head too few": ("KV scatter", other_source(scatter, "head >= heads[cache]", "head + 1 >= heads[cache]")),
    "always the first place": ("KV scatter", other_source(scatter, "position[0]", "0")),
    "the last logit is not seen": ("top-k", other_source(largest, "at < count ?", "at < count - 1 ?")),
    "the first logit is not seen": ("top-k", other_source(largest, "at < count ?", "at && at < count ?")),
    "the last id of equal logits": ("top-k", other_source(largest, "| ~(unsigned)id", "| (unsigned)id")),
    "minus infinity is no number": ("top-k", other_source(largest, "bits >> 31 ? ~bits :", "bits >> 31 ? bits :")),
    "nothing is recorded": ("recorded", never_recorded),
    "a capture that is not left": ("recorded", other_method("recorded", stays_in_capture)),
    "no replay is recorded": ("replay", never_recorded),
    "a replay of old values": ("replay", other_method("recorded", runs_at_once)),
    "not current on threads": ("thread", other_method("active", never_active)),
    "nothing recorded for threads": ("thread", never_recorded),
    "a refusal of another type": ("out of memory", other_method("allocate", untyped)),
    "a refusal that stays": ("out of memory", other_method("allocate", broken_after_refusal)),
    "memory that is not checked": ("out of memory", other_method("allocate", unchecked)),
    "memory that is not freed": ("200 opens", other_method("close", stays_open)),
    "a provider that refuses": ("provider", lame_provider),
    "a provider that copies nothing": ("provider", nothing),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_engine_is_a_no(
    script: ModuleType, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    part, breaks = BROKEN[case]
    with monkeypatch.context() as patched:
        breaks(patched, gpu)
        line = asked(script, part)
    while still_open:
        real_close(still_open.pop())
    gpu.reset()  # a broken engine leaves something behind
    for kernel in (kv_scatter_kernel, topk_kernel):
        gpu.add_kernel(kernel.SOURCE, kernel.NAME)
    assert line["answer"] == "no" and line["detail"], line


def test_no_right_question_is_never_broken() -> None:
    assert {part for part, _ in BROKEN.values()} == set(RIGHT)


# --- libraries and programs -----------------------------------------------------------------------------


def a_sanitizer(folder: Path, text: str, code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nshift 2\necho '{text}'\nexec \"$@\" || exit {code}\n")
    program.chmod(0o755)


SANITIZED = {
    "clean": ("========= ERROR SUMMARY: 0 errors", '{"answer": "yes"}', "yes"),
    "racecheck's form": ("========= RACECHECK SUMMARY: 0 hazards displayed", '{"answer": "yes"}', "yes"),
    "a race": ("========= RACECHECK SUMMARY: 2 hazards displayed", '{"answer": "yes"}', "no"),
    "an error": ("========= ERROR SUMMARY: 3 errors", '{"answer": "yes"}', "no"),
    "no device for it": ("========= Error: Device not supported", '{"answer": "yes"}', "no"),
    "nothing ran": ("========= ERROR SUMMARY: 0 errors", '{"answer": "no"}', "no"),
}


@pytest.mark.parametrize("case", SANITIZED)
def test_the_sanitizers_words_are_read(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    text, said, expected = SANITIZED[case]
    a_sanitizer(tmp_path / "bin", text)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    from gpu_questions import library_questions

    answer = library_questions.sanitized("memcheck", [sys.executable, "-c", f"print({said!r})"])
    assert answer.answer == expected


def test_without_the_sanitizer_it_is_not_here(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert asked(script, "memcheck")["answer"] == "not here"


def test_what_is_sanitized_runs_both_kernels(script: ModuleType, gpu: FakeDriver) -> None:
    line = script.answered(script.KERNELS)
    assert line["answer"] == "yes" and gpu.count("run scatter_kv") > 0 and gpu.count("run topk_logits") > 0
    gpu.add_kernel(topk_kernel.SOURCE.replace("at < count ?", "at < count - 1 ?"), topk_kernel.NAME)
    assert script.answered(script.KERNELS)["answer"] == "no"
    gpu.add_kernel(topk_kernel.SOURCE, topk_kernel.NAME)
    assert '"answer": "yes"' in json.dumps(line)  # as the question about the sanitizer looks for it
    assert script.TO_SANITIZE[-1] == script.KERNELS.name


def test_an_engine_of_tensorrt_is_compared(
    script: ModuleType, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_questions import library_questions

    from merino_edge.export import tensorrt
    from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

    class Built:
        def __init__(self, library: str, graph: bytes, context: int) -> None:
            self.plan = graph  # the stand-in's engines are graphs

    monkeypatch.setattr(tensorrt, "build_engine", Built)
    monkeypatch.setattr(library_questions, "find_spec", lambda name: object())
    answer = library_questions.tensorrt_engine("tensorrt")
    assert answer.answer == "yes", answer.detail
    real = TensorRtEngine.forward
    monkeypatch.setattr(TensorRtEngine, "forward", lambda engine, tokens, start: real(engine, tokens, start) + 1)
    assert library_questions.tensorrt_engine("tensorrt").answer == "no"


def test_without_tensorrt_it_is_not_here(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_questions import library_questions

    monkeypatch.setattr(library_questions, "find_spec", lambda name: None)
    assert {asked(script, f"TensorRT {kind}")["answer"] for kind in ("for RTX", "runs")} == {"not here"}


@pytest.mark.parametrize(("text", "expected"), [("pass", "yes"), ("assert False", "no"), ("pytest.skip()", "no")])
def test_the_tests_result_is_read(script: ModuleType, tmp_path: Path, text: str, expected: str) -> None:
    from gpu_questions import library_questions

    (tmp_path / "test_one.py").write_text(f"import pytest\n\n\ndef test_it():\n    {text}\n")
    answer = library_questions.gpu_tests(str(tmp_path))
    assert answer.answer == expected and "1 " in answer.detail


# --- processes ------------------------------------------------------------------------------------------

ENDS = {
    "a line": ('print(\'noise\'); print(\'{"question": "q", "answer": "yes"}\')', "yes", ""),
    "a crash": ("import os; os.abort()", "no", "SIGABRT"),
    "an exit": ("raise SystemExit('why')", "no", "exit code 1: why"),
    "silence": ("", "no", "exit code 0"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_question_that_crashes_is_a_no(script: ModuleType, case: str) -> None:
    code, answer, detail = ENDS[case]
    line = script.ask_apart("q", [sys.executable, "-c", code], 60)
    assert line["answer"] == answer and detail in line.get("detail", "")


def test_a_question_that_hangs_is_ended_with_its_children(script: ModuleType, tmp_path: Path) -> None:
    code = f"sleep 300 > /dev/null 2>&1 & echo $! > {tmp_path}/child; wait"
    line = script.ask_apart("q", ["sh", "-c", code], 1)
    assert line["answer"] == "no" and "more than 1 s" in line["detail"]
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_machine_is_asked_without_a_package(script: ModuleType, fake_driver: FakeDriver) -> None:
    there, line = script.machine()
    assert there and line["answer"] == "Stand-in" and line["detail"].startswith("1 GPU, a driver for CUDA 12.6; ")
    fake_driver.set(devices=0)
    there, line = script.machine()
    assert not there and line["answer"] == "no GPU" and line["detail"].startswith("cuInit gives error 100")


def test_one_line_a_question_within_the_total_limit(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"question": "the machine", "answer": "a GPU", "detail": "", "seconds": 0}
    monkeypatch.setattr(script, "machine", lambda: (True, machine))
    monkeypatch.setattr(script, "ask_apart", lambda name, command, seconds: limits.append(seconds) or dict(machine))
    limits: list[float] = []
    text = io.StringIO()
    script.ask_all(script.QUESTIONS, 20, [text])
    assert len(text.getvalue().splitlines()) == 1 + len(script.QUESTIONS)
    assert len(limits) == len(script.QUESTIONS) and max(limits) <= 20
    text = io.StringIO()
    lines = script.ask_all(script.QUESTIONS, 1, [text])
    assert {line["answer"] for line in lines[1:]} == {"no time"} and len(limits) == len(script.QUESTIONS)


def test_without_a_gpu_every_answer_says_so(repository: Path, tmp_path: Path) -> None:
    if load_driver() is None:
        pytest.skip("this machine has a GPU")
    out, command = tmp_path / "answers.jsonl", [sys.executable, str(repository / "benchmarks/first_gpu.py")]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = [json.loads(row) for row in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout and len(lines) == 20
    assert {line["answer"] for line in lines} == {"no GPU"} and "numpy" in lines[0]["detail"]


def test_a_question_in_its_own_process(repository: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks/first_gpu.py"), "--ask", "CUDA opens"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = "no" if load_driver() else "yes"
    assert json.loads(done.stdout)["answer"] == expected


def test_the_planted_logit_is_numpys() -> None:
    """The comparison itself: a selection with one id changed is none."""
    from gpu_questions import kernel_questions

    logits = np.arange(100, dtype=np.float32)
    found = topk_kernel.Candidates(logits[95:], np.arange(95, 100))
    assert kernel_questions._is_topk(found, logits, 5)
    assert not kernel_questions._is_topk(found._replace(ids=np.arange(94, 99)), logits, 5)
    assert not kernel_questions._is_topk(None, logits, 5)
