"""Training equals a plain loop around transformers' model, from the same weights and batches."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from merino_edge.architecture import Block
from merino_edge.data.corpus import prepare
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.training.config import TrainingConfig

STEPS = 200


@pytest.fixture(scope="module")
def benchmark(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_speed", repository / "benchmarks" / "training_speed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_two_hundred_steps_as_by_transformers(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text(tiny_stories(seed=3, stories=400))
    a = dataclasses.replace(
        benchmark.A, vocab_size=512, max_positions=64, embedding_width=64, head_dim=16, rotary_dim=16,
        blocks=(Block(64, 2, 4, 2, 128),),
    )  # fmt: skip
    corpus = prepare([tmp_path / "stories.txt"], a.vocab_size, tmp_path / "corpus")
    config = TrainingConfig(STEPS, 8, 64, 8, 3e-3, 20, precision="fp32")
    losses = {name: [step() for _ in range(STEPS)] for name, step in benchmark.loops(corpus, config, a).items()}
    ours, theirs = losses["merino-edge"], losses["transformers"]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[-1] < ours[0] - 2  # it has learned much by then
    assert sum(ours[-20:]) == pytest.approx(sum(theirs[-20:]), rel=5e-3)  # the goal; single batches differ by less too
    assert ours[-1] == pytest.approx(theirs[-1], rel=5e-3)
    assert ours == pytest.approx(losses["plain loop"], rel=1e-3)
