"""Fixtures that any test may ask for; each module of `helpers` keeps those of one thing."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers import warm_python

pytest_plugins = [
    "helpers.made_once",  # others import these two
    "helpers.quick_profile",
    "helpers.artefacts",
    "helpers.fake_driver",
    "helpers.formula_table",
    "helpers.small_bundle",
    "helpers.smollm2",
    "helpers.stand_in_gpu",
    "helpers.tiny_checkpoint",
    "helpers.torch_threads",
]
# A board has no PyTorch (make test-board): the test files that import it are left out there.
TRAINING = (
    r"^(?:import|from) (?:torch|transformers|helpers\.architectures|merino_edge\.(?:pytorch|training|distillation))\b"
)
collect_ignore = [
    str(file)
    for file in Path(__file__).parent.rglob("test_*.py")
    if find_spec("torch") is None and re.search(TRAINING, file.read_text(), re.MULTILINE)
]
# A shell in the background ignores Ctrl-C, and `nohup` a hangup. Programs under test would inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Images often forbid .pyc files. Then each of a thousand commands would compile our modules again, 0.3 s of its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_configure(config: pytest.Config) -> None:
    """Where there are workers, one warm Python serves them all: its imports take ten seconds."""
    if getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        warm_python.share()


def pytest_collection_finish() -> None:
    """Leave what was imported out of the garbage collector's rounds, which take a fifth of the time otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent
