"""Study runs: equal for any number of workers and after any kill; another study in the folder is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.warm_python import warm_merino
from merino_edge import architecture
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.errors import InputError, MerinoError
from merino_edge.search.builtin_spaces import STUDY
from merino_edge.search.study import baselines
from merino_edge.search.study.sampling import decoder_parameters, stratified_sample
from merino_edge.training import state, study_runs
from merino_edge.training.config import TrainingConfig

CONFIG = TrainingConfig(12, 2, 32, 2, 3e-3, 1)
SIZES = {"head_dim": 32, "vocab_size": 2048, "context": 256}
SHAPE = ["--steps=12", "--batch=2", "--sequence=32", "--models=5", "--to=2e5"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "stories.txt"
    path.write_text(tiny_stories(seed=2, stories=100))
    return path


def study(*words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [warm_merino(), "study", *words], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == expect, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "study"
    study(str(folder), "--corpus", str(source), *SHAPE, "--workers=2")
    return folder


def losses(folder: Path) -> dict[str, Any]:
    return {model["id"]: model["losses"] for model in json.loads((folder / "report.json").read_text())["models"]}


def test_it_reports_every_score_of_every_model(whole: Path) -> None:
    document = json.loads((whole / "report.json").read_text())
    drawn = stratified_sample(STUDY, 5, seed=0, min_parameters=1e4, max_parameters=2e5)
    assert [model["id"] for model in document["models"]] == [a.id for a in drawn]
    assert all(len(score["scores"]) == 5 for score in document["scores"]) and len(document["scores"]) > 8
    assert (whole / "report.md").read_text().count("\n") == len(document["scores"]) + 2
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    again = study(str(whole), "--json")  # from what is there
    assert {**json.loads(again.stdout), "sha256": ""} == {**document, "sha256": ""}


def test_killed_and_continued_is_uninterrupted(source: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    words = [sys.executable, "-m", "merino_edge", "study"]  # a group of processes of its own
    words += (str(folder), "--corpus", str(source), *SHAPE, "--workers=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(map(state.exists, folder.glob("models/*"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert any(map(state.exists, folder.glob("models/*")))
    study(str(folder), "--corpus", str(source), *SHAPE, "--workers=1")
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize("bounds", [["--from=10K", "--to=0.2M"], ["--min-params=1e4", "--max-params=200K"]])
def test_sizes_are_written_as_for_search(source: Path, whole: Path, bounds: list[str]) -> None:
    """The same bounds are the same study, which is continued."""
    study(str(whole), "--corpus", str(source), *SHAPE[:-1], *bounds)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--from=many", "--from 'many' is not a positive number; write it as 5, 0.5, 60M or 1.5G"),
        ("--max-params=-1M", "--to '-1M' is not a positive number"),
        ("--to=nan", "--to 'nan' is not a positive number"),
        ("--workers=0", "workers is 0, outside 1 to"),
    ],
)
def test_options_that_are_no_numbers(source: Path, tmp_path: Path, option: str, words: str) -> None:
    done = study(str(tmp_path / "s"), "--corpus", str(source), *SHAPE, option, expect=2)
    assert words in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_models_that_are_given_are_compared(source: Path, tmp_path: Path) -> None:
    for name in ("GPT-2", "SmolLM"):
        width = {"GPT-2": 64, "SmolLM": 96}[name]
        a = baselines.scaled(name, width, 1, head_dim=32, vocab_size=600, context=32)
        architecture.save(tmp_path / f"{name}.json", a)
    given = [f"--model={tmp_path / name}.json" for name in ("GPT-2", "SmolLM")]
    options = [option for option in SHAPE if "models" not in option and "--to" not in option]
    done = study(str(tmp_path / "s"), "--corpus", str(source), *given, *options, "--seeds=2", "--workers=1", "--json")
    first, second = json.loads(done.stdout)["comparison"]
    assert (first["name"], second["name"]) == ("GPT-2", "SmolLM") and first["difference"] is None
    apart = [b - a for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert second["difference"] == pytest.approx(sum(apart) / 2) and second["low"] < second["difference"]


def test_another_study_is_not_continued(source: Path, whole: Path, tmp_path: Path) -> None:
    done = study(str(whole), "--corpus", str(source), *SHAPE[1:], "--steps=13", expect=2)
    assert "is a study of other config; give what it began with, or another folder" in done.stderr
    done = study(str(tmp_path / "nothing"), expect=3)
    assert "holds no study" in done.stderr


def test_drawn_models_are_spread_and_different() -> None:
    bounds = {"min_parameters": 1e4, "max_parameters": 1e6}
    drawn = stratified_sample(STUDY, 8, seed=7, **bounds)
    sizes = [decoder_parameters(a) for a in drawn]
    assert len({a.id for a in drawn}) == 8 and sizes == sorted(sizes) and sizes[0] >= 1e4 and sizes[-1] <= 1e6
    assert sum(size < 1e5 for size in sizes) in (3, 4, 5)  # half of the log range
    assert drawn == stratified_sample(STUDY, 8, seed=7, **bounds) != stratified_sample(STUDY, 8, seed=8, **bounds)
    with pytest.raises(InputError, match="ask for fewer"):
        stratified_sample(STUDY, 24, min_parameters=5e4, max_parameters=5.02e4)


@pytest.mark.parametrize("shape", baselines.SHAPES)
def test_a_hand_shaped_model_keeps_its_shape_within_the_budget(shape: str) -> None:
    width, layers = (96, 5) if shape == "SmolLM" else (192, 3)  # the families' own width per layer: 19.2 and 64
    own = baselines.scaled(shape, width, layers, **SIZES)
    found = baselines.largest(shape, lambda a: a.flops(256), own.flops(256), **SIZES, max_width=512)
    assert found == own and own.embedding_width == width and own.max_positions == 256
    with pytest.raises(InputError, match="change the budget"):
        baselines.largest(shape, lambda a: None, 1.0, **SIZES, max_width=512)


def test_plans_come_back() -> None:
    plan = study_runs.Plan(tuple(stratified_sample(STUDY, 3, seed=1)), (0, 1), CONFIG, "study")
    assert study_runs.Plan.of(plan.to_dict(), Path()) == plan


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_runs, "_train_one", die)
    monkeypatch.setattr(study_runs, "_workers_context", lambda: multiprocessing.get_context("fork"))
    plan = study_runs.Plan(
        tuple(stratified_sample(STUDY, 2, seed=0, min_parameters=1e4, max_parameters=2e5)), (0,), CONFIG
    )
    with pytest.raises(MerinoError, match="was killed, maybe for want of memory; the same command goes on"):
        study_runs.train_all(tmp_path, plan, workers=2)
