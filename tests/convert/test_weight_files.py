"""Weights are found wherever a folder may keep them, and every float type is read exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny_huggingface import GPT2, LLAMA, edit, imported, put_weights, save, weights
from merino_edge.convert.weight_files import StoredWeights
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
NAMES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BF16": ml_dtypes.bfloat16}
NAMES |= {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def _file(path: Path, kinds: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """A safetensors file of random weights of these types and shapes, written by hand. Returns their values."""
    rng, header, data, values = np.random.default_rng(0), {}, b"", {}
    for name, (kind, shape) in kinds.items():
        if kind in NAMES:
            stored = (rng.standard_normal(shape) / 4).astype(NAMES[kind])
            values[name], part = stored.astype(np.float32), stored.tobytes()
        else:
            part = rng.bytes(int(np.prod(shape)) // (2 if kind == "F4" else 1))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return values


def test_every_float_type_is_read_exactly(tmp_path: Path) -> None:
    values = _file(tmp_path / "a.safetensors", {f"w{i}": (kind, (4, 8)) for i, kind in enumerate(NAMES)})
    stored = StoredWeights([tmp_path / "a.safetensors"])
    for name, value in values.items():
        assert stored.load(name).dtype == np.float32
        np.testing.assert_array_equal(stored.load(name), value)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "U8"])
def test_quantised_types_are_refused_with_what_to_do(kind: str, tmp_path: Path) -> None:
    _file(tmp_path / "a.safetensors", {"w": (kind, (4, 8))})
    with pytest.raises(UnsupportedError, match=r"w is .*; choose the model's unquantised files"):
        StoredWeights([tmp_path / "a.safetensors"]).load("w")


def test_a_model_of_float8_weights_is_imported(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    kinds = {name: ("F8_E4M3" if w.ndim == 2 else "BF16", w.shape) for name, w in weights(folder).items()}
    values = _file(folder / "model.safetensors", kinds)
    got = imported(folder, tmp_path / "ckpt")
    for ours, theirs in (("embedding", "embed_tokens"), ("blocks.0.layers.1.ffn.down", "layers.1.mlp.down_proj")):
        np.testing.assert_array_equal(got[f"{ours}.weight"], values[f"model.{theirs}.weight"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    of_transformers = {name: w.float().numpy() for name, w in model.state_dict().items()}
    for ours, theirs in (("embedding", "embed_tokens"), ("blocks.0.layers.1.ffn.down", "layers.1.mlp.down_proj")):
        np.testing.assert_array_equal(got[f"{ours}.weight"], of_transformers[f"model.{theirs}.weight"])


@pytest.mark.parametrize(("kind", "most"), [("F8_E4M3", 448), ("F8_E5M2", 57_344)])
def test_float8_weights_that_look_quantised_are_told_of(kind: str, most: int, tmp_path: Path) -> None:
    for name, largest in (("quiet", most / 2), ("full", most)):
        number = np.array([[0.5, -largest]], NAMES[kind])
        header = json.dumps({"w": {"dtype": kind, "shape": [1, 2], "data_offsets": [0, 2]}}).encode()
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + number.tobytes())
        stored = StoredWeights([path])
        np.testing.assert_array_equal(stored.load("w"), [[0.5, -largest]])
        assert [*stored.notes.values()] == (
            []
            if name == "quiet"
            else [
                f"full.safetensors: w reaches {most}, the largest number of float8, as quantised weights do; "
                "no file has their scales, so they are taken as they are"
            ]
        )


# --- where the files are ---------------------------------------------------------------------------


def _shards(folder: Path, count: int, *, index: bool = True) -> dict[str, str]:
    """Divide the weights of a folder among `count` shards. Returns the index."""
    values, by_weight = weights(folder), {}
    (folder / "model.safetensors").unlink()
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: values[key] for key in sorted(values)[i::count]}
        put_weights(folder, part, name)
        by_weight |= dict.fromkeys(part, name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": by_weight}))
    return by_weight


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 9), index=st.booleans())
def test_shards_are_one_model(count: int, index: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save(tmp_path_factory.mktemp("shards") / "model")
    want = imported(folder, folder.parent / "whole")
    _shards(folder, count, index=index)
    got = imported(folder, folder.parent / "ckpt")
    assert all(np.array_equal(got[name], want[name]) for name in want) and got.keys() == want.keys()


def test_wrong_and_missing_shards_are_named(tmp_path: Path) -> None:
    folder, other = save(tmp_path / "model"), save(tmp_path / "other")
    _shards(folder, 3)
    _shards(other, 2)
    second = "model-00002-of-00003.safetensors"
    (other / "model-00001-of-00002.safetensors").replace(folder / second)
    with pytest.raises(ArtefactError, match=f"appears twice|{second} does not hold .*, as the index says"):
        imported(folder, tmp_path / "ckpt")
    (folder / second).unlink()
    with pytest.raises(ArtefactError, match=f"names '{second}', which is no file beside it"):
        imported(folder, tmp_path / "ckpt")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ArtefactError, match=f"lacks the shard {second}"):
        imported(folder, tmp_path / "ckpt")
    put_weights(folder, {"a": np.zeros(1, np.float32)}, "model-00007-of-00009.safetensors")
    with pytest.raises(ArtefactError, match=r"two models, model-00001-of-0000\d.safetensors and model-00007-"):
        imported(folder, tmp_path / "ckpt")


def test_a_shard_without_a_promised_weight_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    by_weight = _shards(folder, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / by_weight[name]
    from safetensors.numpy import load_file

    put_weights(folder, {key: value for key, value in load_file(file).items() if key != name}, file.name)
    with pytest.raises(ArtefactError, match=f"{file.name} does not hold {name}, as the index says"):
        imported(folder, tmp_path / "ckpt")


@pytest.mark.parametrize("a", [LLAMA, GPT2])
def test_a_tied_model_may_store_its_head_only(a: Any, tmp_path: Path) -> None:
    import dataclasses

    folder = save(tmp_path / "model", dataclasses.replace(a, tied_head=True))
    want = imported(folder, tmp_path / "want")
    values = weights(folder)
    name = next(name for name in values if "embed_tokens" in name or "wte" in name)
    values["lm_head.weight"] = values.pop(name)
    put_weights(folder, values)
    got = imported(folder, tmp_path / "ckpt")
    assert got.keys() == want.keys() and all(np.array_equal(got[key], want[key]) for key in want)


def _without_weights(name: str, content: bytes = b"") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return apply


def _extra(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: put_weights(folder, {**weights(folder), name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("damage", "error", "word"),
    [
        (
            _without_weights("pytorch_model.bin"),
            UnsupportedError,
            r"a pickle can run .* convert it once: python -c",
        ),
        (_without_weights("model-q4.gguf"), InputError, r"holds GGUF files; give one of them: .*model-q4.gguf"),
        (
            _without_weights("consolidated.safetensors"),
            ArtefactError,
            "holds consolidated.safetensors, a layout of another",
        ),
        (
            lambda f: (f / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
            ),
            ArtefactError,
            "pointer of Git LFS, not the file itself; run there: git lfs pull",
        ),
        (
            lambda f: (f / "config.json").write_text(POINTER),
            ArtefactError,
            r"config.json is a pointer of Git LFS",
        ),
        (
            lambda f: (f / "tokenizer.json").write_text(POINTER),
            ArtefactError,
            r"tokenizer.json is a pointer of Git LFS",
        ),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=1),
            UnsupportedError,
            r"layers\.1\..* has no place in a model of this configuration, which has no blocks.*; configuration and",
        ),
        (
            lambda f: edit(f / "generation_config.json", eos_token_id=319),
            ArtefactError,
            r"end token 319 is none of the tokenizer's \d+; model and tokenizer do not belong together",
        ),
        (_extra("model.layers.0.self_attn.q_proj.bias", 32), UnsupportedError, "do not belong together"),
        (
            _extra("model.layers.0.self_attn.q_proj.weight_scale_inv", 1, 1),
            UnsupportedError,
            "belongs to quantised weights; choose the unquantised model",
        ),
        (
            lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}),
            UnsupportedError,
            r"quantization_config \(fp8\) is not supported; choose the model's unquantised files",
        ),
    ],
)
def test_what_cannot_be_read_says_what_to_do(
    damage: Callable[[Path], Any], error: type[MerinoError], word: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model")
    damage(folder)
    with pytest.raises(error, match=word) as refusal:
        imported(folder, tmp_path / "ckpt")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ckpt").exists()
