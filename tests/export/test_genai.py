"""A bundle of `export --genai` is what onnxruntime-genai runs, and says the same tokens there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from merino_edge import bundle
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import UnsupportedError
from merino_edge.export import genai
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.targets import Target
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tokenizer import Tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def even(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model with as many key-value heads in both blocks, as genai asks for."""
    from helpers.random_model import random_model
    from merino_edge import checkpoint

    a = tiny_checkpoint.architecture
    a = replace(a, blocks=tuple(replace(block, kv_heads=1) for block in a.blocks))
    path = tmp_path_factory.mktemp("even") / "checkpoint"
    tokenizer = (tiny_checkpoint.path / "tokenizer.json").read_text()
    weights = random_model(a, strength=1.0)
    checkpoint.save(path, a, weights, tokenizer_json=tokenizer, chat=tiny_checkpoint.chat, training={})
    return checkpoint.load(path)


@pytest.fixture(scope="module", params=["fp32", "int4"])
def written(request: pytest.FixtureRequest, even: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target, out = Target.named("onnxruntime", request.param), tmp_path_factory.mktemp("genai") / "b"

    def engine(graph: Path, context: int) -> OnnxEngine:
        return OnnxEngine(graph, even.architecture, context, 1)

    write_bundle(even, out, ExportOptions(target, CONTEXT, genai=True), engine)
    return out


def greedy(engine: OnnxEngine, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    logits = engine.forward(np.array(prompt), 0)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(logits.argmax()))
        logits = engine.forward(np.array(tokens[-1:]), len(tokens) - 1)
    return tokens


PROMPT = [5, 17, 60, 3, 42]


def as_genai_runs_it(folder: Path, count: int) -> list[int]:
    """The loop of onnxruntime-genai over what the configuration names, with one buffer for past and present."""
    model = json.loads((folder / genai.CONFIG).read_text())["model"]
    decoder = model["decoder"]
    inputs, outputs = decoder["inputs"], decoder["outputs"]
    session = ort.InferenceSession(folder / decoder["filename"], providers=["CPUExecutionProvider"])
    shape = (1, decoder["num_key_value_heads"], model["context_length"], decoder["head_size"])
    caches = {
        (past % layer, present % layer): ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        for layer in range(decoder["num_hidden_layers"])
        for past, present in (
            (inputs["past_key_names"], outputs["present_key_names"]),
            (inputs["past_value_names"], outputs["present_value_names"]),
        )
    }
    assert {value.name for value in session.get_inputs()} == {
        *(past for past, _ in caches),
        inputs["input_ids"],
        inputs["position_ids"],
    }
    tokens, new = list(PROMPT), list(PROMPT)
    while len(tokens) < len(PROMPT) + count:
        binding = session.io_binding()
        binding.bind_cpu_input(inputs["input_ids"], np.array([new], np.int64))
        positions = np.arange(len(tokens) - len(new), len(tokens), dtype=np.int64)[None]
        binding.bind_cpu_input(inputs["position_ids"], positions)
        for (past, present), value in caches.items():
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        binding.bind_output(outputs["logits"])
        session.run_with_iobinding(binding)
        logits = next(v for v in binding.copy_outputs_to_cpu() if v.shape[-1] == model["vocab_size"])
        assert logits.shape == (1, 1, model["vocab_size"])
        new = [int(logits[0, 0].argmax())]
        tokens += new
    return tokens


def test_the_configured_graph_says_the_bundles_tokens(written: Path) -> None:
    loaded = bundle.load(written)
    expected = greedy(OnnxEngine.from_bundle(loaded, 1), PROMPT, 40)
    assert as_genai_runs_it(written, 40) == expected
    onnx.checker.check_model(written / genai.GRAPH, full_check=True)
    # It holds no weights of its own.
    assert (written / genai.GRAPH).stat().st_size < 1.2 * (written / "model.onnx").stat().st_size


def test_onnxruntime_genai_says_the_bundles_tokens(written: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="a peer, which no extra installs")
    expected = greedy(OnnxEngine.from_bundle(bundle.load(written), 1), PROMPT, 40)
    model = og.Model(str(written))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(expected))
    generator = og.Generator(model, options)
    generator.append_tokens(np.array([PROMPT], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    got = generator.get_sequence(0).tolist()
    assert got == expected[: len(got)] and len(got) > len(PROMPT)
    assert og.Tokenizer(model).encode("the board").tolist() == Tokenizer.load(written).encode("the board")


def test_what_genai_has_no_place_for_is_refused(tiny_checkpoint: Checkpoint, even: Checkpoint) -> None:
    a = tiny_checkpoint.architecture
    with pytest.raises(UnsupportedError, match=r"one number of key-value heads, the blocks have \[1, 3\]"):
        genai.check(a, Target.named("onnxruntime", "fp32"))
    with pytest.raises(UnsupportedError, match="graphs of the ort lowering, not native"):
        genai.check(even.architecture, Target.named("rtx", "fp16"))
    with pytest.raises(UnsupportedError, match="int8 cache"):
        genai.check(even.architecture, Target.named("onnxruntime", "int8", cache="int8"))
