"""Graphs as older bundles have them: one row of logits, that of the step's last token, and no input for rows."""

from __future__ import annotations

import numpy as np
import onnx

from merino_edge.graph_io import LOGIT_ROWS


def one_row(graph: bytes) -> bytes:
    """The form of older bundles of a `native` or `primitive` graph."""
    model = onnx.load_from_string(graph)
    (index,) = (i for i, node in enumerate(model.graph.node) if LOGIT_ROWS in node.input)
    gather = model.graph.node[index]
    for name, value in (("last", -1), ("end", 2**31 - 1), ("axis", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    last = onnx.helper.make_node("Slice", [gather.input[0], "last", "end", "axis"], gather.output)
    model.graph.node.remove(gather)
    model.graph.node.insert(index, last)
    model.graph.input.remove(next(value for value in model.graph.input if value.name == LOGIT_ROWS))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model.SerializeToString()
