"""Tests of this folder are skipped where CUDA finds no GPU."""

from __future__ import annotations

import pytest

from helpers.fake_driver import is_loaded
from merino_edge.errors import MerinoError
from merino_edge.runtime.cuda.cuda import Cuda


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if is_loaded():
        pytest.skip("the GPU of this process is a stand-in")
    try:
        Cuda().close()
    except MerinoError as refusal:
        pytest.skip(str(refusal))
