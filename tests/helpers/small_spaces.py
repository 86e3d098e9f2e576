"""Spaces so small that tests can try every architecture: two fixed ones and random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import assume, reject
from hypothesis import strategies as st

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
MAX_SIZE = 1000  # architectures of a random space


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
        )
    except InputError:
        reject()
    assume(space.size <= MAX_SIZE)
    return space
