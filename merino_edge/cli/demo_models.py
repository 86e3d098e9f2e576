"""The models of the demo: how fast they could be, the hand-picked rival of the one that was found, and its stories."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merino_edge.architecture import Architecture
    from merino_edge.search.result import SearchResult
    from merino_edge.search.space import Space

DRAWS = 20  # stories
TEMPERATURE = 0.5
OPENING = "Once upon a time there lived a kind fox named Luna."
PRICES_SECONDS = 20.0  # at most, of a board's budget
MATRIX, PRODUCTS = 1024, 5  # of the estimate of this machine's speed


def matrix_flops_per_s() -> float:
    """The fastest of a few products of large matrices on this machine."""
    import numpy as np

    matrix, fastest_s = np.ones((MATRIX, MATRIX), np.float32), float("inf")
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        matrix @ matrix
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return 2 * MATRIX**3 / fastest_s


def largest(space: Space) -> Architecture:
    """The largest architecture of a space."""
    from merino_edge.search.space import Candidate

    template = len(space.templates) - 1
    return space.architecture(Candidate(template, (len(space.block_choices) - 1,) * space.blocks[-1]))


def middle_parameters(space: Space) -> int:
    """About as many parameters as the demo will train: half of the most."""
    return largest(space).parameters // 2


def fastest_threads(space: Space, precision: str) -> dict[str, Any]:
    """{"threads", "tokens_per_s": {number of threads: speed}}, measured with a middling model."""
    from merino_edge.jetson.profiler.thread_count import measure_threads

    model = largest(space)
    model = dataclasses.replace(model, blocks=model.blocks[: (len(model.blocks) + 1) // 2])
    count = measure_threads(model, precision, len(os.sched_getaffinity(0)))
    return {"threads": count.threads, "tokens_per_s": {str(n): round(s, 1) for n, s in count.tokens_per_s.items()}}


def repeated(path: Path) -> SearchResult:
    """The result of a search again, from its file."""
    from merino_edge import architecture
    from merino_edge.search.result import SearchConfig, run_search

    return run_search(SearchConfig.of(architecture.load(path)[1], str(path)))


def prices_of(paths: Sequence[Path]) -> dict[str, Any]:
    """What more of the budget would be worth, by the name of a search's result."""
    from merino_edge.search.prices import prices

    return {path.name: [str(price) for price in prices(repeated(path), PRICES_SECONDS)] for path in paths}


def write_rival(path: Path, checkpoint_path: Path, out: Path) -> dict[str, Any]:
    """Write what a person would pick under the same budget, with random weights: its speed does not depend on them.

    Every layer is alike, and there are as many parameters as the budget allows.
    """
    from merino_edge import checkpoint
    from merino_edge.search.hand_shapes import hand_shapes
    from merino_edge.weights import random_weights

    result = repeated(path)
    problem, space = result.problem, result.problem.space
    (metric,) = problem.budget.metrics
    shapes = hand_shapes(space, result.candidate.template)
    within = [shape for shape in shapes if problem.feasible(shape)]
    picked = min(shapes, key=lambda shape: problem.value(metric, shape))
    if within:
        picked = max(within, key=lambda shape: space.architecture(shape).parameters)
    trained, a = checkpoint.load(checkpoint_path), space.architecture(picked)
    tokenizer_json = (checkpoint_path / "tokenizer.json").read_text(encoding="utf-8")
    training = {"source": "random"}
    checkpoint.save(out, a, random_weights(a), tokenizer_json=tokenizer_json, chat=trained.chat, training=training)
    return {"architecture": a.to_dict(), "parameters": a.parameters, "score": problem.total(picked)}


def draw_stories(bundle: Path, threads: int) -> dict[str, Any]:
    """Draw stories that begin alike, and count those that keep their names.

    The one that is shown is the first that does, else the first.
    """
    from merino_edge.data.story_names import keeps_names
    from merino_edge.runtime.chat import Chat
    from merino_edge.runtime.open_bundle import open_engine
    from merino_edge.runtime.sampling_parameters import Sampling

    engine, tokenizer, _ = open_engine(bundle, threads=threads)
    stories = []
    with contextlib.closing(engine):
        for seed in range(DRAWS):
            talk = Chat(engine, tokenizer, Sampling(TEMPERATURE, seed=seed), engine.max_positions, raw=True)
            turn = talk.send(OPENING)
            for _ in turn:
                pass
            stories.append((f"{OPENING}{turn.text}".strip(), turn.finish_reason == "stop"))
    keeping = [seed for seed, (story, ended) in enumerate(stories) if ended and keeps_names(story)]
    seed = keeping[0] if keeping else 0
    return {
        "text": stories[seed][0],
        "seed": seed,
        "keeps_names": bool(keeping),
        "draws": DRAWS,
        "draws_that_keep_names": len(keeping),
        "temperature": TEMPERATURE,
        "prompt": OPENING,
    }
