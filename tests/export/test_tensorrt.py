"""NVIDIA's own compiler accepts what `--target rtx` writes: for a pretrained model and for a MeRino one. No GPU."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model
from merino_edge.export.tensorrt import compile_for
from merino_edge.presets import preset
from merino_edge.weights import random_weights

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra [rtx] has no package for this machine")


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("model", ["smollm2", "merino-52m"])
def test_graph_compiles_for_sm86(request: pytest.FixtureRequest, tmp_path: Path, model: str, precision: str) -> None:
    if model == "smollm2":
        checkpoint: Checkpoint = request.getfixturevalue("smollm2")
        a, weights = checkpoint.architecture, checkpoint.weights
    else:
        a = preset(model)
        weights = random_weights(a)
    graph = tmp_path / "model.onnx"
    ir.save(build_model(a, weights, precision, 256, "rtx"), graph, external_data="model.onnx.data")
    compiled = compile_for(graph, 256)
    assert compiled.capability == "SM86"
    # The engine holds the weights at their precision: neither dropped nor widened.
    assert 0.9 * a.weight_bytes(precision) < compiled.engine_bytes < 1.6 * a.weight_bytes(precision)


def test_a_graph_the_parser_does_not_know_is_one_line(tmp_path: Path) -> None:
    x = ir.val("tokens", ir.DataType.FLOAT, [1])
    node = ir.Node("com.example", "Mystery", [x], num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([1])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24, "com.example": 1})
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="cannot parse") as refusal:
        compile_for(tmp_path / "model.onnx", 8)
    assert "\n" not in str(refusal.value)
