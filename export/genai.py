"""A bundle for onnxruntime-genai: its configuration, and a graph in the form that it runs, over the same weights.

The graph differs from `model.onnx` in two things. It has no input `wanted`: it always returns the logits of the last
token. They are float32 [1, 1, V] instead of [N, V]. The configuration names the other inputs and outputs as they are.
Its fields: https://onnxruntime.ai/docs/genai/reference/config. Tried with onnxruntime-genai 0.18.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from merino_edge import artefact
from merino_edge.architecture import Architecture
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import save_beside
from merino_edge.export.targets import Target
from merino_edge.graph_io import NUM_LOGITS
from merino_edge.tokenizer import Tokenizer

GRAPH, CONFIG = "model-genai.onnx", "genai_config.json"


def check(a: Architecture, target: Target) -> None:
    """Raise UnsupportedError where onnxruntime-genai has no place for the graph's inputs."""
    if target.lowering != "ort":
        raise UnsupportedError(
            f"onnxruntime-genai runs graphs of the ort lowering, not {target.lowering}",
            "leave --genai out, or choose --target onnxruntime",
        )
    if a.convolves:
        raise UnsupportedError("onnxruntime-genai keeps no states of short convolutions (LFM2)", "leave --genai out")
    if target.int8_cache:
        raise UnsupportedError("onnxruntime-genai allocates no int8 cache with fixed scales", "leave --cache out")
    if len(heads := {block.kv_heads for block in a.blocks}) > 1:
        raise UnsupportedError(
            f"onnxruntime-genai has one number of key-value heads, the blocks have {sorted(heads)}",
            "leave --genai out, or search with --family llama",
        )


def write(folder: Path, model: ir.Model, a: Architecture, context: int, tokenizer: Tokenizer) -> None:
    """Write the graph of `model` beside the `model.onnx` that holds its weights, and the configuration.

    It changes `model`. Raises OutputError.
    """
    _keep_last_token(model, a)
    save_beside(model, folder / GRAPH, folder / "model.onnx")
    _write(folder / CONFIG, config(a, context, tokenizer))
    _write(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))


def config(a: Architecture, context: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of genai_config.json: greedy unless the caller asks for sampling."""
    chat, block = tokenizer.chat, a.blocks[-1]
    ends = list(chat.eos_token_ids)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": a.head_dim,
        "hidden_size": block.width,
        "num_attention_heads": block.heads,
        "num_hidden_layers": a.layers,
        "num_key_value_heads": block.kv_heads,
        "inputs": {
            "input_ids": "tokens",
            "position_ids": "positions",
            "past_key_names": "key_%d",
            "past_value_names": "value_%d",
        },
        "outputs": {"logits": "logits", "present_key_names": "new_key_%d", "present_value_names": "new_value_%d"},
    }
    first = ends[0] if ends else 0
    return {
        "model": {
            "type": "llama",  # its name for any decoder with these inputs
            "bos_token_id": first if chat.bos_token_id is None else chat.bos_token_id,
            "eos_token_id": ends or -1,
            "pad_token_id": first,
            "vocab_size": a.vocab_size,
            "context_length": context,
            "decoder": decoder,
        },
        "search": {"max_length": context, "do_sample": False, "num_beams": 1, "past_present_share_buffer": True},
    }


def _keep_last_token(model: ir.Model, a: Architecture) -> None:
    """Let the graph return logits [1, 1, V] of the last token."""
    graph = model.graph
    rows = next(value for value in graph.inputs if value.name == NUM_LOGITS)
    graph.inputs.remove(rows)
    rows.const_value = ir.tensor(np.ones(1, np.int64), name=NUM_LOGITS)
    graph.register_initializer(rows)
    plain = graph.outputs[0]
    plain.name = "rows"
    axis = ir.val("rows.axis", ir.DataType.INT64, [1], const_value=ir.tensor(np.zeros(1, np.int64), name="rows.axis"))
    graph.register_initializer(axis)
    node = ir.Node("", "Unsqueeze", [plain, axis], num_outputs=1)
    graph.append(node)
    graph.outputs[0] = node.outputs[0]
    node.outputs[0].name, node.outputs[0].dtype = "logits", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape([1, 1, a.vocab_size])


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    chat = tokenizer.chat
    ids = {"bos_token": chat.bos_token_id, "eos_token": next(iter(chat.eos_token_ids), None)}
    tokens = {name: None if i is None else tokenizer.backend.id_to_token(i) for name, i in ids.items()}
    template = {} if chat.chat_template is None else {"chat_template": chat.chat_template}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **template}


def _write(path: Path, values: dict[str, Any]) -> None:
    artefact.write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
