"""Tiny random models of transformers, one or more of every family that is imported, with every feature switched on.

Windows are shorter than the sequences. Multipliers are not 1, and norms and biases have random values. Scaled rotary
positions differ from unscaled ones within the positions at hand.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

POSITIONS, VOCAB, WINDOW = 64, 320, 9
_BASE: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 96, "max_position_embeddings": POSITIONS},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
}
_FREE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # heads wider than the residual stream
_SCALED = {"rope_theta": 100.0, "factor": 4.0}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", **_SCALED, "original_max_position_embeddings": 16}
_PAIRS = [1.0 + pair / 5 for pair in range(8)]
_LONG = {
    **{"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    **{"short_factor": _PAIRS, "long_factor": [2 * factor for factor in _PAIRS]},
}
_GEMMA = {**_FREE, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0}
_LOCAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_GRANITE = {"embedding_multiplier": 12, "logits_scaling": 8, "residual_multiplier": 0.22, "attention_multiplier": 0.1}
_LFM2 = {
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 130, "block_multiple_of": 32},
    **{"block_ffn_dim_multiplier": 1.2, "rope_parameters": {"rope_type": "linear", **_SCALED}},
}
# Name -> (transformers' model_type, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA3, "attention_bias": True}),
    "llama, linear": (
        "llama",
        {**_FREE, "rope_parameters": {"rope_type": "linear", **_SCALED}, "mlp_bias": True, "hidden_act": "gelu"},
    ),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "mistral": ("mistral", {**_FREE, "sliding_window": WINDOW}),
    "qwen3": ("qwen3", {**_FREE, "tie_word_embeddings": True, "attention_bias": True, "rope_parameters": _YARN}),
    "gemma": ("gemma", _FREE),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2, "rope_parameters": _LOCAL}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi4-mini": (
        "phi3",
        {"tie_word_embeddings": True, "original_max_position_embeddings": 48, "rope_parameters": _LONG},
    ),
    "granite": ("granite", {**_GRANITE, "tie_word_embeddings": True, "attention_bias": True}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "exaone4": ("exaone4", {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "helium": ("helium", {"head_dim": 32, "attention_bias": True}),
    "glm": ("glm", {**_FREE}),
    "glm4": ("glm4", {**_FREE}),
    "ernie4_5": ("ernie4_5", {**_FREE, "use_bias": True}),
    "nemotron": ("nemotron", {"attention_bias": True, "num_attention_heads": 2}),
    "olmo": ("olmo", {"attention_bias": True}),
    "lfm2": ("lfm2", {**_LFM2, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}),
    "lfm2, older names": (
        "lfm2",
        {**_LFM2, "full_attn_idxs": [0, 2], "conv_L_cache": 4, "tie_word_embeddings": False},
    ),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
}


def random_model(name: str, strength: float = 1.5, **others: Any) -> Any:
    """A model of transformers in float32: no norm, bias or other weight has its neutral value.

    A matrix multiplies the size of its input by about `strength`. `others` replace settings of the configuration.
    """
    import transformers

    kind, settings = FAMILIES[name]
    return randomised(
        transformers.AutoConfig.for_model(kind, **copy.deepcopy({**_BASE, **settings, **others})), strength
    )


def randomised(config: Any, strength: float = 1.5) -> Any:
    """`random_model` of a configuration of transformers."""
    import torch
    import transformers

    kind = config.model_type
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            vector = parameter.ndim == 1
            parameter.copy_(torch.randn_like(parameter) * (0.3 if vector else strength / parameter.shape[-1] ** 0.5))
            # A norm's weights lie around 1; Gemma's are stored less one.
            if parameter_name.endswith("norm.weight") and "gemma" not in kind:
                parameter.add_(1.0)
    return model


@cache
def _tokenizer_json() -> str:
    from merino_edge.data.bpe import train_tokenizer

    return str(train_tokenizer(iter(["Hello world, 1984!"] * 9), 300).to_str())


def save(model: Any, folder: Path) -> Path:
    """Write the model as transformers does, with a tokenizer."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
