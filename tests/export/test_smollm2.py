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
ROWS = 8  # tokens of a step
# The prompts whose answers are begun token by token too: a step costs as much as one of eight.
ONE_BY_ONE, BEGUN = (0, 6, 8), 16


@pytest.fixture(scope="module")
def fp32(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    a, target = smollm2.architecture, Target.named("onnxruntime", "fp32")
    out = tmp_path_factory.mktemp("fp32") / "bundle"
    written = write_bundle(
        smollm2, out, ExportOptions(target, 128), lambda graph, context: OnnxEngine(graph, a, context, threads=1)
    )
    return OnnxEngine.from_bundle(written)


def greedy(engine: OnnxEngine, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    logits = engine.forward(np.array(prompt), 0)
    for _ in range(BEGUN):
        tokens.append(int(logits.argmax()))
        logits = engine.forward(np.array(tokens[-1:]), len(tokens) - 1)
    return tokens[len(prompt) :]


def likeliest(engine: OnnxEngine, tokens: list[int], start: int) -> list[int]:
    """The likeliest token at each place from `start` on, after the tokens before it. A step adds eight of them."""
    found = [int(engine.forward(np.array(tokens[:start]), 0).argmax())]
    for first in range(start, len(tokens) - 1, ROWS):
        part = tokens[first : min(first + ROWS, len(tokens) - 1)]
        found += engine.forward_rows(np.array(part), first, len(part)).argmax(-1).tolist()
    return found


def test_greedy_tokens_equal_transformers(fp32: OnnxEngine, smollm2: Checkpoint, smollm2_reference: Any) -> None:
    tokenizer = Tokenizer.load(smollm2.path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len(prompts) == 20
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    smollm2_reference.generation_config.eos_token_id = None
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    theirs = smollm2_reference.generate(padded, **options)[:, longest:].tolist()
    for prompt, answer in zip(prompts, theirs, strict=True):
        assert len(answer) == NEW_TOKENS
        # Greedy decoding writes these tokens exactly if each is the likeliest after those before it.
        assert likeliest(fp32, prompt + answer, len(prompt)) == answer, tokenizer.decode(prompt)
    for i in ONE_BY_ONE:
        assert greedy(fp32, prompts[i]) == theirs[i][:BEGUN], PROMPTS[i]
