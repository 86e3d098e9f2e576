"""The states of short convolutions at a plan: pinned memory that a step reads them from and writes gated inputs to.

The rings themselves stay on the host (merino_edge.runtime.engines.convolution_states) and outlive a plan. A state has
K - 1 rows, so the copies of a step are small. Where the CPU and the GPU share one memory there are none. They have
fixed addresses, so that a step of one token can be recorded with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engines.convolution_states import ConvolutionStates


class PlanStates:
    """Pinned arrays of a plan whose steps have up to `longest` tokens. All calls are within `Cuda.active`."""

    def __init__(self, states: ConvolutionStates, cuda: Cuda, longest: int) -> None:
        """Raises UnsupportedError where there is too little memory."""
        self._states, self._cuda = states, cuda
        self._inputs = {name: cuda.pinned(state.shape, np.float32) for name, state in states.inputs.items()}
        self._outputs = {name: cuda.pinned((longest, width), np.float32) for name, width in states.outputs.items()}

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All pinned arrays by the names of the graph's inputs and outputs: [1, K - 1, W], and [longest, W]."""
        return {**self._inputs, **self._outputs}

    def prepare(self, start: int) -> None:
        """Fill the inputs for a step at `start`."""
        self._states.prepare(start)
        for name, pinned in self._inputs.items():
            pinned[...] = self._states.inputs[name]

    def queue_inputs(self, addresses: Mapping[str, int]) -> None:
        """Queue the copies to the GPU."""
        for name, pinned in self._inputs.items():
            self._cuda.to_device(pinned, addresses[name])

    def queue_outputs(self, addresses: Mapping[str, int], count: int) -> None:
        """Queue the copies from the GPU behind a step of `count` tokens: of the newest rows, which rings keep."""
        first = self._first_kept(count)
        for name, pinned in self._outputs.items():
            self._cuda.to_host(addresses[name] + first * pinned.strides[0], pinned[first:count])

    def keep(self, start: int, count: int) -> None:
        """Keep the gated inputs of a step of `count` tokens at `start`, which is done."""
        first = self._first_kept(count)
        self._states.keep([pinned[None, first:count] for pinned in self._outputs.values()], start + first)

    def _first_kept(self, count: int) -> int:
        return max(0, count - self._states.length)
