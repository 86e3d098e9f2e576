"""The inputs and outputs of an ONNX Runtime step beside its caches, bound to memory that stays.

A step of as many tokens as the one before, as in decode, only changes values. On a GPU an input is copied when it is
bound, so it is bound for every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.graph_io import LOGIT_ROWS, NUM_LOGITS
from merino_edge.runtime.engines.batched_graph import LONGEST
from merino_edge.runtime.engines.convolution_states import ConvolutionStates


class StepBuffers:
    """What the steps of one sequence read and write. `logits` [rows, V] are those of the last step."""

    def __init__(
        self,
        binding: Any,
        inputs: Mapping[str, Any],
        *,
        vocab_size: int,
        states: ConvolutionStates,
        new_kv: Mapping[str, tuple[int, int]],
        dtype: Any,
        copies: bool,
    ) -> None:
        """`inputs` are the graph's by name. `states` are the sequence's, whose inputs each step reads.

        `new_kv`: heads and head size of each output of new keys or values, of type `dtype`; none where caches are
        updated in place. With `copies` an input is copied when it is bound.
        """
        import onnxruntime as ort

        self._binding, self._value, self._copies = binding, ort.OrtValue.ortvalue_from_numpy, copies
        self._vocab_size, self._states, self._new_kv, self._dtype = vocab_size, states, dict(new_kv), dtype
        # Graphs of older bundles have none, and return one row.
        self._rows_input = next(iter({NUM_LOGITS, LOGIT_ROWS} & inputs.keys()), "")
        self.new_kv: list[NDArray[Any]] = []  # [1, Hkv, T, D] each, of a step of T tokens
        self.gated: list[NDArray[Any]] = []  # [1, T, W] each, likewise: the inputs of convolutions
        self._tokens = self._positions = np.zeros((1, 0), np.int64)
        self._longest = np.zeros(1, np.int32)
        self._wanted_rows = (0, 0)  # (tokens of a step, rows of logits) that are bound
        self._room = self.logits = np.zeros((0, vocab_size), np.float32)
        if LONGEST in inputs:
            self._bind_input(LONGEST, self._longest)
        self.want(1)

    @property
    def gives_rows(self) -> bool:
        """Whether a step may return several rows of logits."""
        return bool(self._rows_input)

    def want(self, rows: int) -> None:
        """Let the next steps return `rows` rows of logits."""
        if rows == len(self.logits):
            return
        if len(self._room) < rows:
            self._room = np.zeros((rows, self._vocab_size), np.float32)
        self.logits = self._room[:rows]
        self._bind_output("logits", self.logits)

    def prepare(self, tokens: NDArray[np.int64], start: int) -> None:
        """Bind what a step of `tokens` [T] at positions start.. reads and writes."""
        count = len(tokens)
        is_new = self._tokens.shape[1] != count
        if is_new:
            self._make_outputs(count)  # first: where memory is short, the next step tries again
            self._tokens, self._positions = (np.empty((1, count), np.int64) for _ in range(2))
        self._tokens[0], self._positions[0] = tokens, np.arange(start, start + count)
        self._longest[0] = start + count
        if is_new or self._copies:
            self._bind_input("tokens", self._tokens)
            self._bind_input("positions", self._positions)
        self._prepare_rows(count)
        self._states.prepare(start)
        if (is_new or self._copies) and self._states.inputs:
            for name, state in self._states.inputs.items():
                self._bind_input(name, state)

    def close(self) -> None:
        """Let go of the memory."""
        self.new_kv, self.gated, self._binding = [], [], None

    def _prepare_rows(self, count: int) -> None:
        wanted = (count, len(self.logits))
        if self._rows_input and self._wanted_rows != wanted:
            last = np.arange(count - wanted[1], count)
            rows = np.array([wanted[1]]) if self._rows_input == NUM_LOGITS else last
            self._binding.bind_cpu_input(self._rows_input, rows)
            self._wanted_rows = wanted

    def _make_outputs(self, count: int) -> None:
        """Bind buffers for the new keys and values and the gated inputs of steps of `count` tokens."""
        self.new_kv = [np.empty((1, heads, count, size), self._dtype) for heads, size in self._new_kv.values()]
        self.gated = [np.empty((1, count, width), np.float32) for width in self._states.outputs.values()]
        names: Sequence[str] = [*self._new_kv, *self._states.outputs]
        for name, array in zip(names, [*self.new_kv, *self.gated], strict=True):
            self._bind_output(name, array)

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_ortvalue_input(name, self._value(array))

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_ortvalue_output(name, self._value(array))
