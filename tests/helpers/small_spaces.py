"""Spaces so small that tests can try every architecture: two fixed ones and random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import assume, reject
from hypothesis import strategies as st

from merino_edge.architecture import Block
from merino_edge.errors import InputError
from merino_edge.search.builtin_spaces import DEMO, WIDE, vocabularies
from merino_edge.search.space import Space, Vocabulary

# 7290 architectures of three blocks.
SMALL = replace(DEMO, name="small", widths=(64, 128, 256), ffn_ratios=(1, 2, 4), layers=(1, 2, 3), least_width=0)
# Every dimension has at least two values: 9,936 architectures.
MIXED = replace(
    WIDE,
    name="mixed",
    blocks=(1, 2),
    widths=(128, 192, 256),
    ffn_ratios=(1, 2.5),
    layers=(1, 3),
    kv_groups=(1, 2, 3),
    embedding_widths=(128, 256),
    vocabularies=vocabularies(1024, 4096),
    contexts=(128, 256),
    least_width=0.75,
    least_embedding=0.75,
)
# What blocks of a random space share: fields that came later.
MODELS: tuple[dict[str, Any], ...] = (
    {},
    {"qk_norm": "head", "norm_placement": "both"},
    {"qk_norm": "width", "norm_placement": "after", "attention_cap": 50.0},
)
MAX_SIZE = 1000  # architectures of a random space


# Values so near each other that costs of a percent apart are common, and scores too.
NEAR = replace(WIDE.model, head_dim=2, rotary_dim=2, blocks=(Block(2, 1, 1, 1, 1),))


@st.composite
def near_spaces(draw: st.DrawFn) -> Space:
    """Spaces in which a dominance that is a percent too wide loses the optimum."""

    def some(choices: tuple[Any, ...], min_count: int) -> tuple[Any, ...]:
        picked = draw(st.sets(st.sampled_from(choices), min_size=min_count, max_size=min_count + 1))
        return tuple(choice for choice in choices if choice in picked)

    try:
        space = replace(
            WIDE,
            name="near",
            blocks=some((1, 2, 3), 1),
            widths=some((126, 128, 130), 1),
            ffn_ratios=some((1, 65 / 64, 67 / 64, 69 / 64), 1) if draw(st.booleans()) else (1, 1.5, 2),
            layers=some((5, 6, 7), 1),
            kv_groups=(1,),
            shared=(False,),
            ffn=("swiglu",),
            embedding_widths=some((126, 127, 128), 1),
            vocabularies=(Vocabulary(512, 2.25), Vocabulary(514, 2.26))[: draw(st.integers(1, 2))],
            contexts=some((127, 128, 129), 1),
            least_width=0,
            least_embedding=0,
            model=NEAR,
        )
    except InputError:
        reject()
    assume(8 < space.size <= 400)
    return space


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    def some(choices: tuple[Any, ...], max_count: int) -> tuple[Any, ...]:
        picked = draw(st.sets(st.sampled_from(choices), min_size=1, max_size=max_count))
        return tuple(choice for choice in choices if choice in picked)

    try:
        space = replace(
            WIDE,
            name="random",
            blocks=some((1, 2, 3), 2),
            widths=some((64, 128, 192, 256, 384), 4),
            ffn_ratios=some((1, 1.5, 2.5, 4), 2),
            layers=some((1, 2, 3, 5), 2),
            kv_groups=(1, *some((2, 3), 1)) if draw(st.booleans()) else (1,),
            shared=some((False, True), 2),
            ffn=some(("relu", "swiglu"), 2),
            embedding_widths=some((64, 128, 256), 2),
            vocabularies=(Vocabulary(512, 2.25), Vocabulary(2048, 3.0))[: draw(st.integers(1, 2))],
            contexts=some((64, 128, 256), 2),
            least_width=draw(st.sampled_from((0, 0.5))),
            least_embedding=draw(st.sampled_from((0, 0.5))),
            windows=some((0, 8, 32), 2) if draw(st.booleans()) else (0,),
            model=replace(WIDE.model, **draw(st.sampled_from(MODELS))),
        )
    except InputError:
        reject()
    assume(space.size <= MAX_SIZE)
    return space
