"""Distributed training: any number of workers, with DDP or FSDP2, trains what one trains, and resumes from it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.architectures import TWO_WIDTHS as A
from helpers.warm_python import warm_merino, warm_python
from merino_edge import architecture
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.training import state

OPTIONS = ["--steps=6", "--batch=4", "--sequence=24", "--micro-batch=1", "--learning-rate=0.01", "--warmup=2"]
OPTIONS += ["--precision=fp32", "--ema=0.9"]
# Two workers add gradients up in another order; AdamW divides by their size, so that rounding of tiny ones shows.
ROUNDING = 2e-5


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, *more: str, workers: int = 1) -> list[str]:
    program = [warm_merino()]
    if workers > 1:
        torchrun = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        program = [*torchrun, "--no-python", *program]
    return [*program, "train", str(folder / "A.json"), "--corpus", str(folder / "stories.txt"), *more]


def run(folder: Path, *more: str, workers: int = 1, expect: int = 0) -> subprocess.CompletedProcess[str]:
    words = command(folder, *more, workers=workers)
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=180)
    assert (done.returncode == 0) == (expect == 0), done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers")
    architecture.save(path / "A.json", A)
    (path / "stories.txt").write_text(tiny_stories(seed=2, stories=60))
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    run(folder, "--out", str(folder / "alone"), *OPTIONS)
    return folder / "alone"


def apart(one: Path, other: Path) -> float:
    """The largest difference of two checkpoints' weights."""
    mine, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    return max(float(np.abs(mine[name] - theirs[name]).max()) for name in mine)


def last_loss(path: Path) -> Any:
    return json.loads((path / "training.json").read_text())["history"][-1][1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_train_what_one_trains(folder: Path, alone: Path, tmp_path: Path, parallel: str) -> None:
    done = run(folder, "--out", str(tmp_path / "c"), "--parallel", parallel, "--json", *OPTIONS, workers=2)
    assert json.loads(done.stdout)["step"] == 6  # one worker speaks
    assert last_loss(tmp_path / "c") == pytest.approx(last_loss(alone), rel=1e-6)
    assert apart(tmp_path / "c", alone) < ROUNDING
    assert len((tmp_path / "c" / "log.jsonl").read_text().splitlines()) == 6


def test_another_number_of_workers_goes_on(folder: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    stop_at_three(folder, out)
    assert state.load(out)["step"] == 3
    run(folder, "--out", str(out), "--continue", "--parallel", "fsdp", workers=2)
    assert apart(out, alone) < ROUNDING


def test_sigterm_to_torchrun_saves_and_one_worker_goes_on(folder: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "c", 200
    options = [option for option in OPTIONS if not option.startswith("--steps")]
    options += ["--out", str(out), f"--steps={steps}", f"--save-every={steps}"]
    log = out / state.LOG
    words = command(folder, *options, workers=2)
    with subprocess.Popen(words, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT) as process:
        while not (log.exists() and log.stat().st_size):  # no step is done
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.terminate()
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()  # if it goes on
    assert process.returncode != 0 and "stopped after step" in said
    saved = state.load(out)["step"]
    assert 0 < saved < steps and [path.name for path in tmp_path.iterdir()] == ["c"]
    run(folder, "--out", str(out), "--continue")
    history = json.loads((out / "training.json").read_text())["history"]
    assert history[-1][0] == steps


def stop_at_three(folder: Path, out: Path) -> None:
    """A training in this process that stops after three of its six steps."""
    from merino_edge.training.config import TrainingConfig
    from merino_edge.training.train import train

    config = TrainingConfig(6, 4, 24, 1, 0.01, 2, precision="fp32", ema=0.9)
    asked = iter(range(1, 7))
    train(A, [folder / "stories.txt"], out, config, should_stop=lambda: next(asked) == 3)


def test_workers_that_do_not_divide_the_batch_are_refused(folder: Path, tmp_path: Path) -> None:
    options = [option for option in OPTIONS if not option.startswith("--batch")]
    done = run(folder, "--out", str(tmp_path / "c"), *options, "--batch=3", workers=2, expect=2)
    assert "2 workers cannot share 3 sequences a step" in done.stderr and not (tmp_path / "c").exists()
