"""Fixtures that any test may ask for; each module of `helpers` keeps those of one thing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

pytest_plugins = [
    "helpers.artefacts",
    "helpers.formula_table",
    "helpers.quick_profile",
    "helpers.small_bundle",
    "helpers.smollm2",
    "helpers.tiny_checkpoint",
    "helpers.torch_threads",
]
# A shell lets what it starts in the background ignore Ctrl-C, and the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent
