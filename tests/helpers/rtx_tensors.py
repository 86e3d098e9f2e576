"""The inputs and outputs of a graph, as NVIDIA's parser sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from merino_edge.runtime.engines.plan_tensors import Tensor


def rtx_tensors(rtx: Any, graph: bytes) -> list[Tensor]:
    """What TensorRT for RTX, the module `rtx`, binds of a graph that it must take."""
    log = rtx.Logger(rtx.Logger.ERROR)
    network: Any = rtx.Builder(log).create_network(0)
    assert rtx.OnnxParser(network, log).parse(graph)
    bound = [network.get_input(i) for i in range(network.num_inputs)]
    bound += [network.get_output(i) for i in range(network.num_outputs)]
    return [Tensor(t.name, tuple(t.shape), np.dtype(rtx.nptype(t.dtype)).name) for t in bound]
