"""Random search results, and alterations of them: what the checker of certificates must accept and refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.formula_table import write_formula_table, write_piecewise_table
from helpers.small_spaces import MODELS
from merino_edge import artefact
from merino_edge.errors import BudgetError, InputError
from merino_edge.search.block_precision import measured
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import WIDE
from merino_edge.search.costs import CostModel
from merino_edge.search.result import SearchConfig, SearchResult, run_search
from merino_edge.search.score import parse_score
from merino_edge.search.space import Space, Vocabulary

Document = dict[str, Any]
SCORES = ["effective", "cut", "calibrated", "parameters", "flops", "counting", "exit:exit_power=2,shared_layer=0.3"]
SCORES += ["effective:effectiveness_power=3", "cut:epsilon_squared=50"]
TARGETS = (None, "onnxruntime", "onnxruntime-cuda", "jetpack-6.2", "jetpack-7.2", "rtx")
METRICS = ("parameters", "flops", "weight_mb@int4", "weight_mb@fp16", "kv_mb", "kv_mb@64", "peak_mb@64")
LATENCIES = ("decode_ms@64", "decode_ms@30", "prefill_ms@64", "text_ms@64", "first_token_ms@100", "energy_mj@20")
MAX_SIZE = 30_000  # architectures
# A user's own scores: a sum over blocks, and one that is none.
OWN = """
import math

def heads(model, block, depth, cut):
    return block.layers * block.heads - 0.1 * depth + math.log(cut) + model.vocab_size / 1e5

def whole(architecture):
    return -abs(architecture.layers - 5) + architecture.blocks[-1].width / 1e3
"""


def random_space(rng: random.Random) -> Space:
    """A space of every kind, with at most MAX_SIZE architectures."""

    def some(choices: tuple[Any, ...], most: int) -> tuple[Any, ...]:
        return tuple(sorted(rng.sample(choices, rng.randint(1, most)), key=choices.index))

    while True:
        precisions = tuple(map(measured, some(("fp16", "int8", "int4"), 2))) if rng.random() < 0.25 else ()
        try:
            space = dataclasses.replace(
                WIDE,
                name="random",
                blocks=some((1, 2, 3, 4), 2),
                widths=some((64, 128, 192, 256, 384), 4),
                ffn_ratios=some((1, 1.5, 2.5, 4), 3),
                layers=some((1, 2, 3, 5), 3),
                kv_groups=rng.choice(((1,), (1, 2), (1, 3))),
                shared=some((False, True), 2),
                ffn=some(("relu", "swiglu"), 2),
                embedding_widths=some((64, 128, 256), 2),
                vocabularies=(Vocabulary(512, 2.25), Vocabulary(2048, 3.0))[: rng.randint(1, 2)],
                contexts=some((64, 128, 256), 2),
                least_width=rng.choice((0, 0.5)),
                least_embedding=rng.choice((0, 0.5)),
                precisions=precisions,
                windows=rng.choice(((0,), (0,), (16,), (0, 16, 128))),
                model=dataclasses.replace(WIDE.model, **rng.choice(MODELS)),
            )
        except InputError:
            continue
        if space.size <= MAX_SIZE:
            return space


def random_result(rng: random.Random, folder: Path, *, own: bool = True) -> SearchResult:
    """The result of a random search. `own`: also with a user's scores, which are slow."""
    while True:
        space = random_space(rng)
        keys = rng.sample(METRICS, rng.choice((0, 1, 1, 2, 2, 3)))
        table = None
        if rng.random() < 0.3 and not space.precisions:
            write = rng.choice((write_formula_table, write_piecewise_table))
            table = write(folder, space, "int8", energy=True, cache_buckets=rng.choice((None, 0, 64)))
            keys += rng.sample(LATENCIES, rng.choice((1, 1, 2)))
        spec = rng.choice(SCORES)
        if own and space.size <= 2000 and rng.random() < 0.2:
            (folder / "own.py").write_text(OWN)
            spec = f"{folder / 'own.py'}:{rng.choice(('heads', 'whole'))}"
        target = rng.choice(TARGETS)
        try:
            cost_model = CostModel("int8", table, target)
            config = SearchConfig(
                space, _budget(rng, space, keys, cost_model), parse_score(spec), "int8", table, target=target
            )
            if rng.random() < 0.1:
                evolution = {"iterations": 30, "population": 8, "parents": 4}
                config = dataclasses.replace(config, solver="evolution", options=evolution)
            seconds = 1e-6 if rng.random() < 0.1 and config.score.block is not None else None
            return run_search(config, seconds)
        except (BudgetError, InputError):
            continue


def _budget(rng: random.Random, space: Space, keys: list[str], cost_model: CostModel) -> Budget:
    """Limits are near the costs of random architectures, so they bind."""
    limits = {}
    for key in keys:
        metric, candidate = Metric.parse(key), space.sample(rng)
        template = space.templates[candidate.template]
        if cost_model.positions(metric, template.vocabulary) <= template.context:
            own = [precision.name for precision in space.precisions_of(candidate)]
            value = cost_model.metric_cost(metric, template.vocabulary).value(space.architecture(candidate), own)
            limits[key] = value * rng.choice((1.0, 1.0, 1.1))
    return Budget.of(limits)


def document_of(result: SearchResult) -> Document:
    """The result as a file has it."""
    a = result.architecture
    payload = {"id": a.id, "architecture": a.to_dict(), **result.document()}
    return dict(json.loads(json.dumps(artefact.add_envelope("architecture", payload))))


def signed(document: Document) -> Document:
    """The document with the hash of what it holds now."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    return {**body, "sha256": artefact.sha256_text(artefact.canonical_json(body))}


# --- alterations -----------------------------------------------------------------------------------


def _hidden(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    """A worse architecture is stated, with its own score and costs, as if none were better."""
    problem, assured = result.problem, result.certificate
    assert assured is not None
    for _ in range(300):
        other = problem.space.sample(rng)
        if other.template in problem.templates and problem.feasible(other):
            total = problem.total(other)
            if result.total - total > 1e-6 * abs(result.total):
                less = dataclasses.replace(assured, candidate=other, score=total, bound=total)
                return document_of(dataclasses.replace(result, candidate=other, certificate=less, evolution=None))
    return None


def _bound(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    d["certificate"]["bound"] -= rng.choice((1e-6, 1e-3, 0.5)) * max(1.0, abs(d["certificate"]["bound"]))
    return d


def _score(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    d["score"]["total"] += rng.choice((-1, 1)) * rng.choice((1e-6, 0.1)) * max(1.0, abs(d["score"]["total"]))
    return d


def _cost(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    key = rng.choice(sorted(d["costs"]))
    d["costs"][key] *= rng.choice((0.5, 0.999999, 1.01))
    return d


def _budget_below(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    if not d["budgets"]:
        return None
    key = rng.choice(sorted(d["budgets"]))
    d["budgets"][key] = d["costs"][key] * rng.choice((0.5, 0.999999))
    return d


def _field(name: str, of: str | None, value: Callable[[Any], Any]) -> Callable[..., Document | None]:
    def alter(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
        place = d if of is None else d[of]
        place[name] = value(place[name])
        return d

    return alter


def _classes(d: Document) -> list[dict[str, Any]]:
    return [one for group in d["certificate"].get("groups", []) for one in group["classes"]]


def _price(value: Callable[[float], str]) -> Callable[..., Document | None]:
    """One price of one task is another."""

    def alter(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
        lines = [(one, i) for one in _classes(d) for i, line in enumerate(one["tasks"]) if _positive(line)]
        if not lines:
            return None
        one, i = rng.choice(lines)
        bound, _, vectors = one["tasks"][i].partition(":")
        first, mark, rest = vectors.partition(";")
        prices = first.split()
        k = rng.choice([k for k, price in enumerate(prices) if float(price) > 0])
        prices[k] = value(float(prices[k]))
        one["tasks"][i] = f"{bound}: {' '.join(prices)}{mark}{rest}"
        return d

    return alter


def _positive(line: str) -> bool:
    bound, _, vectors = line.partition(":")
    return bound != "none" and any(float(price) > 0 for price in vectors.partition(";")[0].split())


def _drop(what: str) -> Callable[..., Document | None]:
    """A task, a class, a group, or the note that tasks were tried, is not there."""

    def alter(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
        groups = d["certificate"].get("groups")
        if not groups:
            return None
        group = rng.choice(groups)
        one = rng.choice(group["classes"])
        if what == "group":
            groups.remove(group)
        elif what == "class":
            group["classes"].remove(one)
        elif what == "task":
            one["tasks"].pop(rng.randrange(len(one["tasks"])))
        elif what == "too dear":  # a group is called too dear instead
            groups.remove(group)
            d["certificate"]["too_dear"] = f"{d['certificate']['too_dear']} {group['programs']}".strip()
        else:
            tried = [one for one in _classes(d) if one["tried"]]
            if not tried:
                return None
            rng.choice(tried)["tried"] = []
        return d

    return alter


def _space(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    """The space has one more choice, and its hash and size are right."""
    layers = d["space"]["form"]["layers"]
    d["space"]["form"]["layers"] = [*(layers if isinstance(layers, list) else [layers]), 7]
    d["space"]["sha256"] = artefact.sha256_text(artefact.canonical_json(d["space"]["form"]))
    d["certificate"]["architectures"] = dataclasses.replace(
        result.problem.space, layers=(*result.problem.space.layers, 7)
    ).size
    return d


def _table(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    if d["table"] is None:
        return None
    entry = rng.choice(d["table"]["entries"])
    entry[4] *= rng.choice((0.5, 1.5))
    return d


def _no_table(d: Document, rng: random.Random, result: SearchResult) -> Document | None:
    return d | {"table": None} if d["table"] is not None else None


# By name: the alteration, and whether it must be refused even where the hash was made anew. The others may leave a
# claim that is true: of another question, or with another proof.
ALTERATIONS: dict[str, tuple[Callable[..., Document | None], bool]] = {
    "a better architecture hidden": (_hidden, True),
    "the bound lowered": (_bound, True),
    "the score altered": (_score, True),
    "a cost altered": (_cost, True),
    "a budget below the cost": (_budget_below, True),
    "the gap altered": (_field("gap_percent", "certificate", lambda gap: gap + 1.5), True),
    "the number of architectures altered": (_field("architectures", "certificate", lambda n: n + 1), True),
    "the id altered": (_field("id", None, lambda text: text[::-1] + "0"), True),
    "another version": (_field("version", "certificate", lambda version: version + 1), True),
    "a price not a number": (_price(lambda price: "nan"), True),
    "a price infinite": (_price(lambda price: "inf"), True),
    "a price negative": (_price(lambda price: f"{-price:g}"), True),
    "a price halved": (_price(lambda price: f"{price / 2:.6g}"), False),
    "a price raised": (_price(lambda price: f"{price * 3:.6g}"), False),
    "a task dropped": (_drop("task"), True),
    "a class dropped": (_drop("class"), True),
    "a group dropped": (_drop("group"), True),
    "a group called too dear": (_drop("too dear"), True),
    "tried tasks not tried": (_drop("tried"), False),
    "a space with more in it": (_space, False),
    "a table entry altered": (_table, False),
    "no table": (_no_table, True),
}


def altered(name: str, document: Document, rng: random.Random, result: SearchResult) -> Document | None:
    """The altered document with its old hash; None where it has nothing to alter in this way."""
    if name == "a better architecture hidden" and result.certificate is None:
        return None
    if document["certificate"]["bound"] is None:
        return None
    other = ALTERATIONS[name][0](copy.deepcopy(document), rng, result)
    if other is None or not all(map(math.isfinite, (other["certificate"]["bound"], other["score"]["total"]))):
        return None
    return {**other, "sha256": document["sha256"]}
