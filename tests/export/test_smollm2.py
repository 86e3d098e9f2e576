"""A real pretrained model through the real exporter and engine writes what transformers writes with the same file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers.smollm2 import PROMPTS
from merino_edge.checkpoint import Checkpoint
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tokenizer import Tokenizer

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def fp32(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    a, target = smollm2.architecture, Target.named("onnxruntime", "fp32")
    out = tmp_path_factory.mktemp("fp32") / "bundle"
    written = write_bundle(
        smollm2, out, ExportOptions(target, 512), lambda graph, context: OnnxEngine(graph, a, context, threads=1)
    )
    return OnnxEngine.from_bundle(written)


def greedy(engine: OnnxEngine, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    logits = engine.forward(np.array(prompt), 0)
    for _ in range(NEW_TOKENS):
        tokens.append(int(logits.argmax()))
        logits = engine.forward(np.array(tokens[-1:]), len(tokens) - 1)
    return tokens[len(prompt) :]


def test_greedy_tokens_equal_transformers(fp32: OnnxEngine, smollm2: Checkpoint, smollm2_reference: Any) -> None:
    tokenizer = Tokenizer.load(smollm2.path)
    assert len(PROMPTS) == 20
    for text in PROMPTS:
        prompt = tokenizer.encode(text)
        ours = greedy(fp32, prompt)
        # Greedy decoding writes these tokens exactly if each is the likeliest after those before it.
        with torch.inference_mode():
            logits = smollm2_reference(torch.tensor([prompt + ours])).logits[0]  # [T, V]
        assert ours == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), text
