"""Tiny random models of transformers as GGUF files, laid out as llama.cpp's converter does it.

Names of tensors come from the package `gguf`, factors of scaled rotary positions from the model in transformers. So
nothing here knows how an import reads a file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from helpers.tiny_families import VOCAB, random_model

# Name in tiny_families -> (llama.cpp's architecture, settings that it has in place of those there)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, linear": ("llama", {"hidden_act": "silu"}),
    "mistral": ("llama", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"attention_bias": False}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3_text": (
        "gemma3",
        {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "num_hidden_layers": 7, "attention_bias": False},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4, "use_sliding_window": False}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi4-mini": ("phi3", {"max_position_embeddings": 320, "original_max_position_embeddings": 256}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {"attention_bias": False}),
    "stablelm": ("stablelm", {}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "glm": ("chatglm", {"attention_bias": True, "head_dim": 16}),
    "glm4": ("glm4", {"attention_bias": True}),
    "ernie4_5": ("ernie4_5", {"use_bias": False}),
    "nemotron": ("nemotron", {"mlp_bias": True}),
}
PERMUTED = ("llama", "smollm3", "granite")  # their rows of query and key are stored as neighbours
ONE_ADDED = ("gemma", "gemma2", "gemma3", "nemotron")  # to every norm


def tiny_model(name: str, **others: Any) -> Any:
    """The random model of transformers."""
    return random_model(name, **{**MODELS[name][1], **others})


def _metadata(file: gguf.GGUFWriter, arch: str, model: Any) -> dict[str, np.ndarray]:
    """Write the metadata; return tensors of rotary factors."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_key_length(head_dim)
    file.add_value_length(head_dim)
    file.add_vocab_size(c.vocab_size)
    if arch in ("stablelm", "nemotron"):
        file.add_layer_norm_eps(getattr(c, "layer_norm_eps", None) or c.norm_eps)
    else:
        file.add_layer_norm_rms_eps(c.rms_norm_eps)
    if arch == "stablelm":
        file.add_parallel_residual(c.use_parallel_residual)
    if arch.startswith("gemma") and arch != "gemma":
        file.add_sliding_window(c.sliding_window)
        for add, cap in (
            (file.add_final_logit_softcapping, c.final_logit_softcapping),
            (file.add_attn_logit_softcapping, c.attn_logit_softcapping),
        ):
            if cap:
                add(cap)
    if arch == "phi3":
        file.add_sliding_window(c.sliding_window or 0)
    if arch == "granite":
        file.add_attention_scale(c.attention_multiplier)
        file.add_embedding_scale(c.embedding_multiplier)
        file.add_residual_scale(c.residual_multiplier)
        file.add_logit_scale(c.logits_scaling)
    return _rotary(file, model, head_dim)


def _rotary(file: gguf.GGUFWriter, model: Any, head_dim: int) -> dict[str, np.ndarray]:
    c = model.config
    rope, rotary = c.rope_parameters, model.model.rotary_emb
    if "full_attention" in rope:
        file.add_float32(f"{file.arch}.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    fraction = rope.get("partial_rotary_factor") or getattr(c, "partial_rotary_factor", None) or 1.0
    dim, base = int(head_dim * fraction), rope["rope_theta"]
    file.add_rope_freq_base(base)
    file.add_rope_dimension_count(dim)
    kind = rope["rope_type"]
    if kind == "llama3":
        plain = base ** -(np.arange(0, dim, 2) / dim)
        return {"rope_freqs.weight": (plain / rotary.inv_freq.numpy()).astype(np.float32)}
    if kind == "longrope":
        original = c.original_max_position_embeddings
        file.add_rope_scaling_orig_ctx_len(original)
        longer = math.log(c.max_position_embeddings / original)
        file.add_rope_scaling_attn_factors(math.sqrt(1 + longer / math.log(original)))
        lists = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{name}.weight": np.array(values, np.float32) for name, values in lists.items()}
    if kind in ("linear", "yarn"):
        file.add_rope_scaling_type(gguf.RopeScalingType(kind))
        file.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        file.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return {}


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads, 2, D / 2] -> [heads, D / 2, 2]: neighbours turn together."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _vocabulary(file: gguf.GGUFWriter) -> None:
    tokens = ["<zero>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(tokens)
    file.add_token_types([3 if i < 3 else 5 if token.startswith("[PAD") else 1 for i, token in enumerate(tokens)])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(2)


def write(name: str, model: Any, path: Path) -> Path:
    """Write the model of transformers that `tiny_model(name)` made as a GGUF file of float32 weights."""
    arch = MODELS[name][0]
    c = model.config
    file = gguf.GGUFWriter(str(path), arch)
    tensors = _metadata(file, arch, model)
    _vocabulary(file)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    theirs = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
    for key, parameter in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        named = theirs.get_name(key, (".weight", ".bias"))
        assert named is not None, key
        array = parameter.numpy()
        if arch in PERMUTED and (".q_proj." in key or ".k_proj." in key):
            array = _permuted(array, c.num_attention_heads if ".q_proj." in key else c.num_key_value_heads)
        if arch in ONE_ADDED and key.endswith("norm.weight"):
            array = array + np.float32(1)
        tensors[named] = array
    for named, array in tensors.items():
        file.add_tensor(named, np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path
