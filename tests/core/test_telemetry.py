"""Nothing is sent: ONNX Runtime's telemetry is off before it starts, and the home folder stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# No other variable: ONNX Runtime is silent by itself where it sees those of a continuous integration.
KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")


def run(*words: str, **variables: str) -> str:
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    done = subprocess.run(
        [sys.executable, *words],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        stdin=-3,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_home_stays_empty(tmp_path: Path) -> None:
    answer = run(
        "-m", "merino_edge", "generate", "--prompt", "hi", "--max-tokens", "2", "--threads", "1",
        HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1",
    )  # fmt: skip
    assert answer.strip() and not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(("own", "kept"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_a_value_of_the_user_s_own_stays(own: dict[str, str], kept: str) -> None:
    assert run("-c", "import merino_edge, os; print(os.environ['ORT_DISABLE_TELEMETRY'])", **own).strip() == kept
