"""LoRA adapters: importing one equals importing the model into which it was merged by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_huggingface import GPT2, LLAMA, edit, imported, put_weights, save, weights
from merino_edge import checkpoint
from merino_edge.architecture import Architecture
from merino_edge.convert.import_model import import_model
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError

RANK, ALPHA = 4, 6
QUERY, DOWN, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
CONV = "transformer.h.1.attn.c_attn"


def _adapter(folder: Path, base: Path, modules: list[str], rank: int = RANK, **settings: Any) -> dict[str, np.ndarray]:
    """Write an adapter of random matrices in peft's format. Returns them."""
    folder.mkdir(exist_ok=True)
    rng, values, parts = np.random.default_rng(3), weights(base), {}
    for module in modules:
        shape = values[f"{module}.weight"].shape
        out, into = shape[::-1] if module in (CONV, EMBEDDING) else shape
        kind, end = ("lora_embedding_", "") if module == EMBEDDING else ("lora_", ".weight")
        parts[f"base_model.model.{module}.{kind}A{end}"] = rng.standard_normal((rank, into), np.float32)
        parts[f"base_model.model.{module}.{kind}B{end}"] = rng.standard_normal((out, rank), np.float32)
    put_weights(folder, parts, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps({"lora_dropout": 0.1, "loftq_config": {}, **config}))
    return parts


def _equals_the_merged(adapter: Path, base: Path, changes: dict[str, np.ndarray], **options: Any) -> None:
    got = imported(adapter, adapter.with_name("got"), **options)
    put_weights(base, {**weights(base), **changes})
    want = imported(base, adapter.with_name("want"))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "modules", "settings", "scale"),
    [
        (LLAMA, [QUERY, DOWN], {}, ALPHA / RANK),
        (LLAMA, [QUERY], {"use_rslora": True}, ALPHA / RANK**0.5),
        (LLAMA, [EMBEDDING], {}, ALPHA / RANK),
        (LLAMA, [QUERY], {"alpha_pattern": {"q_proj": 20}}, 20 / RANK),
        (GPT2, [CONV], {"fan_in_fan_out": True}, ALPHA / RANK),
        (GPT2, [CONV], {}, ALPHA / RANK),
        (LLAMA, [QUERY], {"fan_in_fan_out": True}, ALPHA / RANK),  # a square matrix: peft sets it to false
    ],
)
def test_it_is_merged_as_by_hand(
    a: Architecture, modules: list[str], settings: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    base = save(tmp_path / "base", a)
    parts = _adapter(tmp_path / "lora", base, modules, **settings)
    changes = {}
    for module in modules:
        name = f"{module}.weight"
        of = {key.rpartition("lora_")[2][-8:]: value for key, value in parts.items() if module in key}
        down, up = (next(value for key, value in of.items() if part in key) for part in "AB")
        delta = np.float32(scale) * (up @ down)
        turned = module in (CONV, EMBEDDING)
        changes[name] = weights(base)[name] + (delta.T if turned else delta)
    _equals_the_merged(tmp_path / "lora", base, changes)


def test_dora_keeps_the_length_of_each_row(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    parts = _adapter(tmp_path / "lora", base, [QUERY], use_dora=True)
    length = np.linspace(1, 2, 32, dtype=np.float32)
    put_weights(
        tmp_path / "lora",
        {**parts, f"base_model.model.{QUERY}.lora_magnitude_vector": length},
        "adapter_model.safetensors",
    )
    got = imported(tmp_path / "lora", tmp_path / "got")["blocks.0.layers.0.attention.query.weight"]
    down, up = parts.values()
    merged = weights(base)[f"{QUERY}.weight"] + ALPHA / RANK * (up @ down)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), length, rtol=1e-5)
    cosines = (got * merged).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(merged, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-5)


def test_whole_weights_of_an_adapter_replace_the_base_s(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    parts = _adapter(tmp_path / "lora", base, [], modules_to_save=["lm_head"])
    head = np.random.default_rng(5).standard_normal((320, 32)).astype(np.float32)
    put_weights(tmp_path / "lora", {**parts, "base_model.model.lm_head.weight": head}, "adapter_model.safetensors")
    _equals_the_merged(tmp_path / "lora", base, {"lm_head.weight": head})


def test_the_base_is_named_found_or_given(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    _adapter(tmp_path / "lora", base, [QUERY], base_model_name_or_path="owner/base")
    with pytest.raises(InputError, match=r"LoRA adapter of owner/base, which is not here; .*--base owner/base"):
        import_model(tmp_path / "lora", tmp_path / "ckpt")
    import_model(tmp_path / "lora", tmp_path / "ckpt", base=base)
    source = checkpoint.load(tmp_path / "ckpt").training["source"]
    assert source["name"] == "base" and source["adapter"]["name"] == "lora" and len(source["adapter"]["sha256"]) == 64
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).replace(tmp_path / "lora" / name)  # an adapter may bring its own
    import_model(tmp_path / "lora", tmp_path / "own", base=base)
    with pytest.raises(InputError, match="is no adapter"):
        import_model(base, tmp_path / "third", base=base)


def _narrower(lora: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    values = weights(lora, "adapter_model.safetensors")
    put_weights(lora, {**values, name: values[name][:15].copy()}, "adapter_model.safetensors")


def _tied(folder: Path) -> None:
    values = weights(folder)
    values.pop("lm_head.weight")
    put_weights(folder, values)
    edit(folder / "config.json", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("settings", "damage", "error", "word"),
    [
        ({"peft_type": "IA3"}, None, UnsupportedError, "kind 'IA3' is not supported"),
        ({"peft_type": "PREFIX_TUNING"}, None, UnsupportedError, "kind 'PREFIX_TUNING'"),
        ({"target_parameters": ["x"]}, None, UnsupportedError, "target_parameters"),
        ({"init_lora_weights": "pissa"}, None, UnsupportedError, "'pissa' changes the base as well"),
        ({"r": 8}, None, ArtefactError, "has the rank 8, its weights 4; configuration and weights do not belong"),
        ({"r": "x"}, None, ArtefactError, "r is x"),
        ({"rank_pattern": {"(a+)+$": 3}}, None, UnsupportedError, "regular expression"),
        ({}, lambda lora, base: (lora / "adapter_model.safetensors").unlink(), ArtefactError, "holds no adapter_model"),
        (
            {},
            lambda lora, base: (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin"),
            UnsupportedError,
            "adapter_model.bin is a pickle",
        ),
        (
            {},
            lambda lora, base: _narrower(lora),
            ArtefactError,
            r"change of .* \[15, 32\], the base.s .* \[16, 32\]",
        ),
        ({}, lambda lora, base: _tied(base), UnsupportedError, "embedding and head at once"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(
    settings: dict[str, Any], damage: Callable[..., Any] | None, error: type[MerinoError], word: str, tmp_path: Path
) -> None:
    base = save(tmp_path / "base")
    _adapter(tmp_path / "lora", base, ["model.layers.0.self_attn.k_proj", EMBEDDING], **settings)
    if damage:
        damage(tmp_path / "lora", base)
    with pytest.raises(error, match=word) as refusal:
        import_model(tmp_path / "lora", tmp_path / "ckpt")
    assert "\n" not in str(refusal.value) and not (tmp_path / "ckpt").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    other = save(
        tmp_path / "other", dataclasses.replace(LLAMA, blocks=(dataclasses.replace(LLAMA.blocks[0], layers=3),))
    )
    _adapter(tmp_path / "lora", other, ["model.layers.2.self_attn.q_proj"])
    with pytest.raises(ArtefactError, match=r"the base has no model\.layers\.2\.self_attn\.q_proj\.weight"):
        import_model(tmp_path / "lora", tmp_path / "ckpt", base=base)
