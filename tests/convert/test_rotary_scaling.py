"""Scaled rotary positions: frequencies and attention factors are those of transformers, for every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers.wrong_values import WRONG, changed, refusal
from merino_edge.convert.config import Config
from merino_edge.convert.families import FAMILIES
from merino_edge.convert.rotary_scaling import Rope, spelled
from merino_edge.errors import UnsupportedError

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
PAIRS = [1.0 + pair / 10 for pair in range(32)]
LONG = {"short_factor": PAIRS, "long_factor": PAIRS, "original_max_position_embeddings": 4096}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 8.0}),
    ("dynamic", {"factor": 2.0}),
    ("llama3", LLAMA3),
    ("yarn", YARN),
    ("yarn", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    ("yarn", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}),
    ("yarn", {**YARN, "attention_factor": 1.3}),
    ("longrope", LONG),
    ("longrope", {**LONG, "attention_factor": 1.1}),
]
LLAMA = {
    **{"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 96, "max_position_embeddings": 131072, "rope_theta": 500000.0},
}


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_frequencies_equal_those_of_transformers(kind: str, fields: dict[str, Any]) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": 500000.0, **fields}
    theirs = transformers.LlamaConfig(**{**LLAMA, "rope_parameters": dict(parameters)})
    expected, attention = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    rope = Config({**LLAMA, "rope_scaling": parameters}, "config.json").rope()
    factors = rope.factors(64, 131072)
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / np.array(factors or 1.0), expected.numpy(), rtol=2e-6)
    assert rope.attention_factor(131072) == pytest.approx(attention, rel=1e-12)
    assert rope.positions(131072) == (4096 if kind == "longrope" else 131072)
    again = spelled(500000.0, 64, factors, 131072)
    assert Config({"rope_parameters": again}, "config.json").rope().factors(64, 131072) == factors
    assert again["rope_type"] == {"yarn": "longrope", "dynamic": "default"}.get(kind, kind)


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_wrong_values_are_refused_in_one_line(kind: str, fields: dict[str, Any]) -> None:
    whole = {**LLAMA, "rope_scaling": {"type": kind, "rope_theta": 1e4, **fields}}
    for field in whole["rope_scaling"]:
        for value in WRONG:
            values = changed(whole, ("rope_scaling", field), value)
            c = Config(values, "config.json")
            line = refusal(lambda c=c: FAMILIES["llama"].folding(c, FAMILIES["llama"].architecture(c)))
            assert "\n" not in line and len(line) < 5_000


def test_what_stands_inside_comes_before_what_stands_beside() -> None:
    """transformers 5 writes the base inside. Read as the default, it gave a model that computed something else."""

    def base(**values: Any) -> float:
        return FAMILIES["llama"].architecture(Config({**LLAMA, "rope_theta": None, **values}, "c")).rotary_base

    inside = {"rope_type": "default", "rope_theta": 7e4}
    assert base(rope_scaling=inside) == base(rope_parameters=inside) == base(rope_scaling=inside, rope_theta=5e5) == 7e4
    assert base(rope_theta=5e5, rope_scaling={"type": "default"}) == 5e5 and base() == 1e4


def test_the_same_words_name_an_unknown_kind_each_time() -> None:
    scaling = {"zoom": 2.0, "mrope_section": [1], "rope_type": "yarn", "factor": 2.0}
    with pytest.raises(UnsupportedError, match="rope_scaling: mrope_section, zoom is not supported"):
        Config({"rope_scaling": scaling}, "config.json").rope()
    with pytest.raises(UnsupportedError, match="rope_type 'ntk' is not supported"):
        Config({"rope_scaling": {"type": "ntk", "alpha": 1}}, "config.json").rope()


def test_older_spellings_mean_the_same() -> None:
    """Gemma 3 and Phi-3 as transformers 4 wrote them."""
    gemma = {**LLAMA, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 512, "sliding_window_pattern": 2}
    scaling = {"rope_type": "linear", "factor": 8.0}
    full = {"rope_theta": 1e6, **scaling}
    nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": scaling}
    read = FAMILIES["gemma3_text"].architecture
    assert read(Config({**gemma, "rope_theta": None, "rope_parameters": nested}, "c")) == read(Config(gemma | old, "c"))
    phi = {**LLAMA, "original_max_position_embeddings": 4096}
    lists = {"short_factor": PAIRS, "long_factor": PAIRS}
    a, b = (
        FAMILIES["phi3"].architecture(Config({**phi, "rope_scaling": {"type": kind, **lists}}, "c"))
        for kind in ("su", "longrope")
    )
    assert a == b and a.max_positions == 4096 and a.rotary_factors == tuple(PAIRS)


def test_a_factor_of_one_is_no_scaling() -> None:
    assert Rope(1e4, kind="linear", fields={"factor": 1.0}).factors(64, 100) == ()
