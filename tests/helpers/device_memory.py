"""A check of the GPU's memory, for a GPU and for its stand-in."""

from __future__ import annotations

import numpy as np

from merino_edge.runtime.cuda.cuda import Cuda


def assert_memory_comes_back(cuda: Cuda) -> None:
    """Memory starts as zeros, and holds what was sent. Within `cuda.active`."""
    sent, back = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    address = cuda.allocate(sent.nbytes)
    cuda.to_host(address, back)
    cuda.synchronize()
    assert not back.any() and address % 256 == 0
    cuda.to_device(sent, address)
    cuda.to_host(address, back)
    cuda.synchronize()
    np.testing.assert_array_equal(back, sent)
