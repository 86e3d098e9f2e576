from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge import architecture, artefact
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArchitectureError, ArtefactError, MerinoError, OutputError
from merino_edge.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    a = preset(name)
    assert Architecture.from_dict(json.loads(json.dumps(a.to_dict()))) == a
    written = architecture.save(tmp_path / "a.json", a, seed=3)
    loaded, document = architecture.load(tmp_path / "a.json")
    assert loaded == a and document == written and document["seed"] == 3 and document["id"] == a.id


def test_the_id_is_stable_and_depends_on_every_field() -> None:
    a = preset("smollm2-135m")
    assert a.id == "9f8a0ab9b3d7"  # a change here orphans every artefact that names its architecture
    changes: dict[str, Any] = {
        "vocab_size": 49153,
        "max_positions": 8191,
        "embedding_width": 577,
        "tied_head": False,
        "norm": "layernorm",
        "norm_placement": "post",
        "norm_epsilon": 1e-6,
        "ffn": "gelu",
        "position_offset": 1,
        "rotary_dim": 32,
        "rotary_base": 1e4,
        "bias": "qkv",
        "parallel_residual": True,
        "qk_norm": "head",
        "rotary_factors": (2.0,) * 32,
        "local_rotary_base": 1e4,
        "attention_cap": 50.0,
        "logit_cap": 30.0,
        "blocks": (replace(a.blocks[0], window=512),),
    }
    convolving = (replace(a.blocks[0], convolution=3), a.blocks[0])
    assert len({replace(a, blocks=convolving, convolution_bias=bias).id for bias in (False, True)}) == 2
    assert len({replace(a, **{key: value}).id for key, value in changes.items()} | {a.id}) == len(changes) + 1


BLOCK = {"width": 768, "layers": 1, "heads": 12, "kv_heads": 12, "ffn_width": 64}
ROTARY = {"positions": "rotary", "rotary_dim": 4}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 1.5}, "vocab_size must be a whole number"),
    ({"vocab_size": True}, "vocab_size"),
    ({"max_positions": 10**9}, "max_positions"),
    ({"embedding_width": -1}, "embedding_width"),
    ({"head_dim": None}, "head_dim"),
    ({"head_dim": 512, "blocks": [{**BLOCK, "heads": 36}]}, "heads 36 times head_dim 512 is over"),
    ({"norm": "batchnorm"}, "layernorm, rmsnorm"),
    ({"norm_epsilon": 0}, "norm_epsilon"),
    ({"norm_epsilon": float("nan")}, "norm_epsilon"),
    ({"tied_head": 1}, "tied_head must be a bool"),
    ({"positions": "rotary"}, "rotary_dim is 0"),
    ({"positions": "rotary", "rotary_dim": 7}, "must be even"),
    ({"positions": "rotary", "rotary_dim": 66}, "rotary_dim is 66"),
    ({"rotary_dim": 4}, "rotary_dim must be 0"),
    ({"parallel_residual": True, "norm_placement": "post"}, "norm_placement pre"),
    ({"blocks": []}, "blocks is empty"),
    ({"blocks": {}}, "blocks must be a list"),
    ({"blocks": [3]}, r"blocks\[0\] must be an object"),
    ({"blocks": [{**BLOCK, "layers": 0}]}, r"blocks\[0\].layers is 0"),
    ({"blocks": [{**BLOCK, "window": -1}]}, r"blocks\[0\].window is -1"),
    ({"blocks": [{**BLOCK, "window": True}]}, "window must be a whole number"),
    ({"blocks": [{**BLOCK, "rotary": "some"}]}, "not one of global, local, none"),
    ({"blocks": [{**BLOCK, "rotary": "none"}]}, "needs rotary positions"),
    ({**ROTARY, "blocks": [{**BLOCK, "rotary": "local"}]}, "a local_rotary_base"),
    ({**ROTARY, "rotary_factors": [1.0]}, "must be 2 numbers"),
    ({**ROTARY, "rotary_factors": [1.0, 0.0]}, "holds 0.0"),
    ({"rotary_factors": [1.0]}, "rotary_factors must be"),
    ({"local_rotary_base": 1e4}, "needs rotary positions"),
    ({"attention_cap": -1.0}, "attention_cap is -1.0"),
    ({"logit_cap": float("nan")}, "logit_cap is nan"),
    ({"qk_norm": "all"}, "none, head, width"),
    ({"parallel_residual": True, "norm_placement": "both"}, "norm_placement pre"),
    ({"blocks": [{**BLOCK, "kv_heads": 5}]}, "kv_heads 5 must divide"),
    ({"blocks": [{**BLOCK, "shared": "no"}]}, "shared must be a bool"),
    ({"blocks": [{**BLOCK, "depth": 1}]}, "unknown depth"),
    ({"blocks": [BLOCK, {**BLOCK, "width": 704, "heads": 11, "kv_heads": 11}]}, "widths must not decrease"),
    ({"blocks": [{**BLOCK, "layers": 600}, {**BLOCK, "layers": 600}]}, "total layers is 1200"),
    ({"blocks": [BLOCK] * 257}, "number of blocks"),
    ({"blocks": [{**BLOCK, "convolution": 1}, BLOCK]}, r"blocks\[0\].convolution is 1"),
    ({"blocks": [{**BLOCK, "convolution": True}, BLOCK]}, "convolution must be a whole number"),
    ({"blocks": [{**BLOCK, "convolution": 3, "window": 8}, BLOCK]}, "neither a window nor a rotary"),
    ({"blocks": [{**BLOCK, "convolution": 3}]}, "at least one needs attention"),
    ({"convolution_bias": True}, "needs layers with a convolution"),
    ({"colour": "blue"}, "unknown colour"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_a_broken_rule_is_named_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchitectureError, match=words) as caught:
        Architecture.from_dict({**preset("opt-125m").to_dict(), **change})
    assert "\n" not in str(caught.value)


def test_later_fields_are_written_only_where_they_are_used() -> None:
    """Older artefacts keep their ids, and older versions read what they can compute."""
    assert not {"qk_norm", "rotary_factors", "logit_cap", "convolution_bias"} & preset("smollm2-135m").to_dict().keys()
    assert not {"window", "rotary", "convolution"} & preset("smollm2-135m").to_dict()["blocks"][0].keys()


def test_a_missing_field_is_named() -> None:
    value = preset("gpt2").to_dict()
    del value["head_dim"]
    with pytest.raises(ArchitectureError, match="missing head_dim"):
        Architecture.from_dict(value)
    with pytest.raises(ArchitectureError, match="must be an object"):
        Architecture.from_dict([])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_equal(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A flipped bit, a cut or a foreign byte never gives another architecture or another error."""
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    architecture.save(path, preset("merino-52m"))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)
    with contextlib.suppress(MerinoError):
        assert architecture.load(path)[0] == preset("merino-52m")


def test_foreign_newer_and_altered_files_are_refused(tmp_path: Path) -> None:
    path, a = tmp_path / "a.json", preset("gpt2")
    payload = {"id": a.id, "architecture": a.to_dict()}
    for document, words in [
        (artefact.add_envelope("space", payload), "not an architecture"),
        (artefact.add_envelope("architecture", payload, schema_version=2), "schema version 2"),
        ({**artefact.add_envelope("architecture", payload), "seed": 1}, "does not match its own sha256"),
        (artefact.add_envelope("architecture", {**payload, "id": "0" * 12}), "id 000000000000"),
        ([], "is not a architecture artefact"),
    ]:
        path.write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(ArtefactError, match=words):
            architecture.load(path)
    with pytest.raises(ArtefactError, match="does not exist"):
        architecture.load(tmp_path / "none.json")
    with pytest.raises(ArtefactError, match="is a folder"):
        architecture.load(tmp_path)
    with pytest.raises(OutputError):
        architecture.save(path / "below-a-file.json", a)


def test_derived_shape() -> None:
    a = preset("merino-52m")
    assert a.layers == len(a.layer_blocks()) == sum(block.layers for block in a.blocks)
    assert Block(64, 3, 1, 1, 64, shared=True).weight_layers == 1 and Block(64, 3, 1, 1, 64).weight_layers == 3
    assert preset("opt-125m").position_rows == 2050 and preset("pythia-70m").position_rows == 0
