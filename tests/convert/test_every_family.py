"""Every family that is imported computes as in transformers: in PyTorch, step by step, and in every lowering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.tiny_families import FAMILIES, POSITIONS, VOCAB, random_model, save
from merino_edge import checkpoint
from merino_edge.architecture import Architecture
from merino_edge.convert import families
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_huggingface import export_to_huggingface
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.export.targets import LOWERINGS
from merino_edge.pytorch.model import KVCache, Model
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

TOLERANCE = 1e-4  # of the largest logit; found: 4e-6 at most


def _difference(got: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def test_every_family_has_a_model_here() -> None:
    older = {"opt", "gpt2", "gpt_neox"}  # tests/convert/test_huggingface.py has theirs
    assert {kind for kind, _ in FAMILIES.values()} | older == families.FAMILIES.keys()


PUBLISHED: list[tuple[str, int, dict[str, Any]]] = [  # (model_type, parameters, the configuration's shape)
    (
        "qwen3",
        596_049_920,  # Qwen3-0.6B
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    (
        "gemma3_text",
        999_885_952,  # gemma-3-1b
        {"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144, "sliding_window": 512},
    ),
    (
        "gemma2",
        2_614_341_888,  # gemma-2-2b
        {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000},
    ),
    (
        "smollm3",
        3_075_098_624,  # SmolLM3-3B
        {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4}
        | {"intermediate_size": 11008, "vocab_size": 128256},
    ),
    (
        "phi3",
        3_836_021_760,  # Phi-4-mini
        {"hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"intermediate_size": 8192, "vocab_size": 200064, "partial_rotary_factor": 0.75}
        | {"tie_word_embeddings": True},
    ),
    (
        "lfm2",
        1_170_340_608,  # LFM2-1.2B, by the names of its own config.json
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"block_ff_dim": 12288, "vocab_size": 65536, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "conv_dim": 2048},
    ),
    (
        "llama",
        1_235_814_400,  # Llama-3.2-1B
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
]


@pytest.mark.parametrize(("kind", "parameters", "shape"), PUBLISHED)
def test_published_models_have_their_published_counts(kind: str, parameters: int, shape: dict[str, Any]) -> None:
    config = families.Config({**shape, "max_position_embeddings": 4096}, "config.json")
    assert families.FAMILIES[kind].architecture(config).parameters == parameters


@pytest.fixture(scope="module", params=FAMILIES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A family's name here, its model in transformers, and the checkpoint imported from it."""
    folder, theirs = tmp_path_factory.mktemp("family"), random_model(request.param)
    import_model(save(theirs, folder / "theirs"), folder / "ckpt")
    return request.param, theirs, folder / "ckpt"


@torch.no_grad()
def test_a_family_computes_as_in_transformers(imported: tuple[str, Any, Path]) -> None:
    _, theirs, path = imported
    loaded = checkpoint.load(path)
    a, weights = loaded.architecture, loaded.weights
    assert a.parameters == sum(weight.size for weight in weights.values())
    assert Architecture.from_dict(a.to_dict()) == a and Architecture.from_dict(a.to_dict()).id == a.id
    ours, cache = Model.from_weights(a, weights).eval(), KVCache(a)
    tokens, steps = [3], []
    while len(tokens) <= a.max_positions:  # 64 tokens, the likeliest each time; windows end at 9
        steps.append(ours(torch.tensor([tokens[-1:]]), cache, len(tokens) - 1)[0, 0].numpy())
        tokens.append(int(steps[-1].argmax()) if len(tokens) % 8 else int(np.argsort(steps[-1])[-len(tokens)]))
    sequence = torch.tensor([tokens[:-1]])
    expected, whole = theirs(sequence).logits[0].numpy(), ours(sequence)[0].numpy()
    assert _difference(whole, expected) <= TOLERANCE
    assert _difference(steps, expected) <= TOLERANCE
    assert (np.array(steps).argmax(-1) == expected.argmax(-1)).all()
    for lowering in LOWERINGS:
        graph = to_bytes(build_model(a, weights, "fp32", a.max_positions, lowering=lowering))
        engine, ids = OnnxEngine(graph, a, a.max_positions, threads=1), np.array(tokens[:-1])
        ends = [7, 8, 9, 12, 20, *range(28, len(ids), 8), len(ids) - 1, len(ids)]
        for first, end in zip([0, *ends], ends, strict=False):
            got = engine.forward_rows(ids[first:end], first, end - first)
            assert _difference(got, expected[first:end]) <= TOLERANCE, lowering


@torch.no_grad()
def test_a_family_goes_back_to_transformers(imported: tuple[str, Any, Path], tmp_path: Path) -> None:
    import transformers

    name, theirs, path = imported
    a = checkpoint.load(path).architecture
    if not families.FAMILIES[FAMILIES[name][0]].written:
        with pytest.raises(UnsupportedError, match="no family of transformers has"):
            export_to_huggingface(path, tmp_path / "back")
        return
    written = export_to_huggingface(path, tmp_path / "back")
    assert written.family == FAMILIES[name][0]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    sequence = torch.randint(0, VOCAB, (1, min(POSITIONS, a.max_positions)), generator=torch.Generator().manual_seed(1))
    assert _difference(again(sequence).logits, theirs(sequence).logits) <= TOLERANCE
    assert import_model(tmp_path / "back", tmp_path / "again").id == a.id
