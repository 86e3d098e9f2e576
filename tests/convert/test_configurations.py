"""Settings of `config.json` that change what a model computes: as in transformers, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers import tiny_families
from merino_edge.convert import huggingface
from merino_edge.convert.families import FAMILIES, Config
from merino_edge.errors import MerinoError
from merino_edge.pytorch.model import Model

SHAPE: dict[str, Any] = {
    **{"vocab_size": tiny_families.VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64},
    **{"eos_token_id": 2, "pad_token_id": 0},
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3 = {"head_dim": 32, "sliding_window": 9, "sliding_window_pattern": 2}
BY_KIND = {FULL: {"rope_type": "default", "rope_theta": 1000.0}, SLIDING: {"rope_type": "default", "rope_theta": 100.0}}
LINEAR = {"rope_type": "linear", "factor": 4.0}
KINDS = [SLIDING, FULL, FULL]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3_text", {**GEMMA3, "rope_parameters": BY_KIND, "rope_scaling": LINEAR}),
        ("gemma3_text", {**GEMMA3, "rope_scaling": LINEAR, "rope_theta": 1000.0, "rope_local_base_freq": 100.0}),
        ("gemma3_text", {**GEMMA3, "rope_parameters": {FULL: {"rope_type": "default"}}, "rope_theta": 77.0}),
        ("smollm3", {"layer_types": KINDS, "sliding_window": 9, "use_sliding_window": False}),
        ("glm4", {"head_dim": 32, "partial_rotary_factor": None}),
        ("gemma2", {"head_dim": 32, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ],
)
@torch.no_grad()
def test_a_setting_means_what_it_means_in_transformers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**SHAPE, "model_type": family, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = tiny_families.randomised(transformers.AutoConfig.from_pretrained(tmp_path))
    tiny_families.save(theirs, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))  # as on the hub, not as transformers writes it
    read = huggingface.read(tmp_path, lambda done, total: None)
    tokens = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(3))
    expected = theirs(tokens).logits
    difference = (Model.from_weights(read.architecture, read.weights)(tokens) - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "settings", "word"),
    [
        ("qwen3", {"is_causal": False}, "is_causal"),
        ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"sliding_window": 9}, "sliding_window 9"),
        ("gpt_neox", {"sliding_window": 9}, "sliding_window 9"),
        ("llama", {"layer_types": KINDS}, "layer_types 'sliding_attention'"),
        ("qwen3", {"layer_types": KINDS, "sliding_window": None}, "sliding_window is null"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        ("nanochat", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
            "beside the kinds of layers",
        ),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "type without rope_type"),
        ("gpt_neox", {"head_dim": 8}, "head_dim 8"),
        ("stablelm", {"head_dim": 32}, "head_dim 32"),
    ],
)
def test_a_setting_without_equivalent_is_refused_by_name(family: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(MerinoError, match=word):
        FAMILIES[family].architecture(Config({**SHAPE, **settings}, "config.json"))
    harmless = {"is_causal": True, "sliding_window": 64, "layer_types": [FULL] * 3, "use_sliding_window": False}
    FAMILIES[family].architecture(Config({**SHAPE, **harmless}, "config.json"))
