"""Configurations of every family with wrong values in their fields: an architecture, or a typed refusal."""

from __future__ import annotations

import pytest

from helpers.wrong_values import MISSING, WRONG, changed, refusal
from merino_edge.architecture import Architecture, Block
from merino_edge.convert.families import FAMILIES, Config

ROTARY = Architecture(
    *(320, 64, 64, 32, (Block(64, 2, 2, 2, 128),)), norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=32
)
LEARNED = Architecture(320, 64, 64, 32, (Block(64, 2, 2, 2, 128),))
MORE = {
    "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "default"},
    "rope_parameters": {"rope_theta": 1e4},
    "hidden_act": "silu",
    "quantization_config": None,
    "sliding_window": None,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_values(name: str) -> None:
    family = FAMILIES[name]
    whole = {**MORE, **family.config(LEARNED if name in ("opt", "gpt2") else ROTARY)}
    refused = 0
    for field in whole:
        for value in WRONG:
            values = changed(whole, (field,), value)
            try:
                line = refusal(lambda values=values: family.architecture(Config(values, "config.json")))
            except Exception as error:
                shown = "nothing" if value is MISSING else repr(value)[:60]
                raise AssertionError(f"{field} = {shown}: {type(error).__name__}: {error}") from error
            refused += bool(line)
            assert "\n" not in line and len(line) < 5_000
    assert refused > len(whole)
