"""Tests of this folder are skipped where CUDA finds no GPU."""

from __future__ import annotations

import pytest

from merino_edge.errors import MerinoError
from merino_edge.runtime.cuda.cuda import Cuda


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    try:
        Cuda().close()
    except MerinoError as refusal:
        pytest.skip(str(refusal))
