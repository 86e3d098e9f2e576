"""A space small enough to profile in seconds, and a clock quick enough for tests."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest

from merino_edge.architecture import Architecture, Block
from merino_edge.jetson.profiler import batching, contention, random_graph, time_budget, timer
from merino_edge.search.space import Space, Vocabulary

_kept = lru_cache(maxsize=512)(random_graph._built)  # graphs of models as small as those of `tiny_space`


@pytest.fixture(scope="session")
def tiny_space() -> Space:
    return Space(
        name="tiny",
        blocks=(2,),
        widths=(32, 64),
        ffn_ratios=(1, 2),
        layers=(1, 2),
        kv_groups=(1, 2),
        shared=(True,),
        ffn=("relu",),
        embedding_widths=(64,),
        vocabularies=(Vocabulary(96),),
        contexts=(16,),
        least_width=0,
        least_embedding=0,
        model=Architecture(1, 1, 1, head_dim=32, blocks=(Block(32, 1, 1, 1, 1),)),
    )


@pytest.fixture
def hasty_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rounds of shorter bursts: these tests judge what is written, not how steady it is."""
    hasten(monkeypatch)


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hasty_clock`, for a fixture of a longer life.

    A model's graph, which is the same in every profile, is made by the first.
    """
    monkeypatch.setattr(timer, "warm_up_steps", lambda mode, step_s: 0)
    monkeypatch.setattr(timer, "BURST_STEPS", 1)
    monkeypatch.setattr(timer, "COLD_STEPS", 1)
    monkeypatch.setattr(contention, "QUIET_LOOPS", 100)
    ladder = tuple(dataclasses.replace(detail, rounds=2) for detail in time_budget.LADDER)
    monkeypatch.setattr(time_budget, "LADDER", ladder)
    monkeypatch.setattr(time_budget, "MAX_ROUNDS", 2)
    monkeypatch.setattr(batching, "QUICK_SHARE", 1)
    monkeypatch.setattr(random_graph, "_kept", _kept)
