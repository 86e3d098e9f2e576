"""A graph for several sequences: what changes in it, and nothing else, as ONNX's own library reads it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from merino_edge.architecture import Architecture
from merino_edge.export.graph import build_model, build_stored, cache_names, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.batched_graph import FLAT, LONGEST, batched

Small = tuple[Architecture, dict[str, np.ndarray]]


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_only_axes_the_length_and_shapes_change(small_model: Small, cache: str) -> None:
    a, weights = small_model
    target = replace(Target.named("onnxruntime", "int8"), cache=cache)
    scales = {name: np.float32(0.05) for names in cache_names(a) for name in names[:1]} if cache == "int8" else {}
    stored = replace(store(a, weights, target), cache_scales=scales)
    before = onnx.load_model_from_string(plain := to_bytes(build_stored(a, stored, target, a.max_positions)))
    changed = batched(plain)
    assert changed is not None
    after = onnx.load_model_from_string(changed)
    onnx.checker.check_model(after)
    assert [value.name for value in after.graph.input] == [*(value.name for value in before.graph.input), LONGEST]
    values_after = [*list(after.graph.input)[:-1], *after.graph.output]
    for old, new in zip([*before.graph.input, *before.graph.output], values_after, strict=True):
        free = len(dims(old)) > 1 and dims(old)[0] == 1
        assert dims(new) == (["B", *dims(old)[1:]] if free else dims(old))
    pairs = zip(before.graph.node, after.graph.node, strict=True)
    different = [(old.op_type, new.op_type, list(new.input)) for old, new in pairs if old != new]
    assert sorted(kind for kind, _, _ in different) == ["Add", "Reshape"]
    assert {(new, inputs[-1]) for _, new, inputs in different} == {("Identity", LONGEST), ("Reshape", FLAT)}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    for tensor in before.graph.initializer:
        old, new = numpy_helper.to_array(tensor), values.pop(tensor.name)
        if not np.array_equal(old, new):
            assert old[:2].tolist() == [1, -1] and new[:2].tolist() == [0, -1] and old[2:].tolist() == new[2:].tolist()
    assert {name: value.tolist() for name, value in values.items()} == {FLAT: [-1]}


@pytest.mark.parametrize("lowering", ["native", "primitive"])
def test_a_graph_without_such_attention_has_no_batch(small_model: Small, lowering: str) -> None:
    a, weights = small_model
    assert batched(to_bytes(build_model(a, weights, "fp32", a.max_positions, lowering=lowering))) is None
