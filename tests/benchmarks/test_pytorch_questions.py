"""The questions about PyTorch, asked of the CPU: what a GPU is compared with, and the arithmetic of MFU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from merino_edge.presets import shrunk
from merino_edge.pytorch.engine import TorchEngine
from merino_edge.training import throughput

A = shrunk("merino-64m")
STEPS = ((0, 30), (30, 31), (20, 21))


@pytest.fixture
def questions(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    questions = importlib.import_module("gpu_questions.pytorch_questions")
    monkeypatch.setattr(questions, "TIMED_STEPS", 1)
    monkeypatch.setattr(questions, "FIRST_STEPS", 1)
    monkeypatch.setitem(throughput.SIZES, "cpu", 32)  # bf16 is emulated on most CPUs
    return questions


@pytest.mark.usefixtures("one_thread")
def test_an_engine_that_computes_the_same_is_a_yes(questions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = questions.engine("cpu", A, STEPS)
    assert answer.answer == "yes" and "fp16 differs by" in answer.detail
    real = TorchEngine.forward

    def wrong_in_half(engine: TorchEngine, tokens: Any, start: int) -> Any:
        logits = real(engine, tokens, start)
        halved = engine._model is not None and next(engine._model.parameters()).dtype == torch.float16
        return 1.1 * logits if halved and start == 20 else logits

    monkeypatch.setattr(TorchEngine, "forward", wrong_in_half)
    answer = questions.engine("cpu", A, STEPS)
    assert answer.answer == "no" and answer.detail.startswith("fp16")


@pytest.mark.usefixtures("one_thread")
def test_mfu_is_the_share_of_a_matrix_product(questions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = questions.training(A, batch=2, sequence=32, micro_batch=1)
    assert answer.answer > 0 and "tokens/s" in answer.detail
    monkeypatch.setattr(questions, "_trained", lambda *shape, compiled: (0.5, 1.0, "peak"))
    monkeypatch.setattr(throughput, "matmul_flops_per_second", lambda device, bf16: 1e9)
    answer = questions.training(A, batch=2, sequence=32, micro_batch=1)
    assert answer.answer == pytest.approx(100 * throughput.training_flops_per_token(A, 32) * 128 / 1e9, abs=0.06)


@pytest.mark.usefixtures("one_thread")
def test_compiling_is_a_ratio(questions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(True))
    answer = questions.compiling(A, batch=1, sequence=32, micro_batch=1)
    assert answer.answer > 0 and compiled == [True]


def test_without_a_gpu_they_are_not_here(questions: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    question = importlib.import_module("gpu_questions.question")
    for ask in (questions.shared_context, questions.engine, questions.training, questions.compiling):
        line = question.answered(question.Question("q", ask))
        assert line["answer"] == "not here" and "finds no GPU" in line["detail"]
