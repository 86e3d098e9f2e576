"""The board's road on stand-ins: `doctor`, `profile`, `build` of a read-only bundle, `generate` through TensorRT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_driver import load_driver
from helpers.stranger import run

ASK = ("--raw", "--prompt", "Once", "--seed", "1", "--max-tokens", "30", "--threads", "1")


def test_a_read_only_bundle_is_built_and_answers_as_on_the_cpu(
    good: Path, repository: Path, tmp_path: Path, merino: tuple[str, ...]
) -> None:
    if load_driver() is None:
        pytest.skip("this machine has NVIDIA's driver, or no C++ compiler")
    bundle, store = tmp_path / "bundle", tmp_path / "engines"
    options = ("--target", "jetpack-6.2", "--precision", "fp16", "--context", "64,16", "--threads", 1)
    assert run("export", good / "checkpoint", *options, "--out", bundle) == 0
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    bundle.chmod(0o555)

    def said(*command: object) -> str:
        variables = {**os.environ, "MERINO_ENGINES": str(store)}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 0, done.stderr
        calls.append(done.stderr)
        return done.stdout

    calls: list[str] = []
    board = (sys.executable, repository / "tests/container/stand_in_board.py")
    built = json.loads(said(*board, "build", bundle, "--json"))
    assert built["out"] == str(store) and [engine["context"] for engine in built["engines"]] == [64, 16]
    assert {engine["capability"] for engine in built["engines"]} == {"SM87"}
    answer = said(*board, "generate", bundle, *ASK)
    assert "running on the CPU" not in calls[-1] and "stand-in driver: 0 calls" not in calls[-1]
    assert answer == said(*merino, "generate", bundle, "--cpu", *ASK) and answer.strip()
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before


def test_the_doctor_and_a_profile_find_the_gpu_and_the_release(good: Path, repository: Path, tmp_path: Path) -> None:
    if load_driver() is None:
        pytest.skip("this machine has NVIDIA's driver, or no C++ compiler")

    def said(release: str, *command: object) -> dict[str, Any]:
        variables = {**os.environ, "MERINO_ENGINES": str(tmp_path / release), "TENSORRT": release}
        board = [sys.executable, repository / "tests/container/stand_in_board.py", *command, "--json"]
        done = subprocess.run([*map(str, board)], capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    features = said("10.16", "doctor")["features"]
    assert features["TensorRT"] == {"on": True, "why": "10.16"}
    assert [name for name in ("CUDA on the GPU", "CUDA graphs") if not features[name]["on"]] == []
    profile = ("profile", "--space", good / "space.json", "--precision", "fp16", "--quick", "--backend", "tensorrt")
    for release in ("10.3", "10.16"):
        planned = said(release, *profile, "--dry-run", "--out", tmp_path / "table.jsonl")
        assert planned["engines"] > 0 and planned["eta_seconds"] > 0
        kept = [file.read_bytes() for file in (tmp_path / release / "profile").glob("*.engine")]
        assert kept and all((b"TensorScatter" in engine) == (release == "10.16") for engine in kept)
    assert not (tmp_path / "table.jsonl").exists()
