"""A child process ends with whoever started it, whenever the interrupt comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SLEEPER = [sys.executable, "-IS", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def child_process(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import child_process

    yield child_process
    sys.modules.pop("child_process")


def test_an_interrupt_while_the_child_starts_leaves_none(
    child_process: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[str]] = []
    popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen

    def interrupted_once_begun(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        begun.append(popen(*arguments, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted_once_begun)
    with pytest.raises(KeyboardInterrupt), child_process.started(SLEEPER, subprocess.PIPE):
        pytest.fail("the interrupt came before")
    assert begun[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
