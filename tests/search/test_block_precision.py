"""Precisions of blocks as choices: costs and scores by definition, and exact optima that equal brute force."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.search_verb import merino, written
from helpers.small_spaces import MIXED, SMALL
from merino_edge import artefact, counts
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, WARM, Sums, single
from merino_edge.latency.table import LatencyTable
from merino_edge.search import space_file
from merino_edge.search.block_precision import NATS, NATS_PER_LOG_PARAMETERS, BlockPrecision, measured
from merino_edge.search.brute_force import brute_force
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import EDGE, WIDE, load_space
from merino_edge.search.costs import CostModel
from merino_edge.search.evolution import evolve
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.pareto import pareto_front
from merino_edge.search.peak_memory import peak_sums
from merino_edge.search.problem import Problem
from merino_edge.search.score import Score, parse_score
from merino_edge.search.space import Candidate, Space, Vocabulary

WriteTable = Callable[..., LatencyTable]
ALL = tuple(map(measured, ("int4", "int8", "fp16")))
SCORES = ("effective", "cut", "exit:shared_layer=0.1", "parameters", "effective:shared_layer=0.3")
COUNTED = ("weight_mb@int4", "weight_mb@fp16", "peak_mb@64", "parameters", "kv_mb", "flops")
TIMED = ("decode_ms@64", "prefill_ms@64", "text_ms@30")
SPACES = 48
DRAWS = 5  # of a score and budgets, in each space
MAX_SIZE = 300
SLOWNESS = {"int4": 0.8, "int8": 1.2, "fp16": 2.1, "fp32": 4.0}  # factors on the times of a table


def random_space(rng: random.Random) -> Space:
    """A space of at most MAX_SIZE architectures, whose blocks have two or three precisions with any loss."""

    def some(values: tuple[Any, ...], most: int) -> tuple[Any, ...]:
        return tuple(sorted(rng.sample(values, rng.randint(1, most))))

    while True:
        names = rng.sample(counts.PRECISIONS, rng.randint(2, 3))
        space = replace(
            WIDE,
            name="random",
            blocks=some((1, 2, 3), 2),
            widths=some((64, 128, 192), 2),
            ffn_ratios=some((1, 2.5), 2),
            layers=some((1, 2, 4), 2),
            kv_groups=(1,),
            shared=rng.choice(((False,), (True,), (False, True))),
            ffn=(rng.choice(("relu", "swiglu")),),
            embedding_widths=some((64, 128), 2),
            vocabularies=(Vocabulary(512, 2.25), Vocabulary(2048, 3.0))[: rng.randint(1, 2)],
            contexts=(128,),
            precisions=tuple(BlockPrecision(name, rng.choice((0.0, 0.01, 0.05, rng.random()))) for name in names),
            least_width=0,
            least_embedding=0,
        )
        if space.size <= MAX_SIZE:
            return space


def tables(write_table: WriteTable, space: Space) -> dict[str, LatencyTable]:
    names = {"int8", *(precision.name for precision in space.precisions)}
    return {name: write_table(space, name, slowness=SLOWNESS[name]) for name in sorted(names)}


def best_by_definition(problem: Problem, limits: dict[str, float]) -> float:
    """The highest score of an architecture whose costs, each summed over its parts, are within the limits."""
    best, space = -math.inf, problem.space
    costs = [{m: problem.metric_cost(m, i) for m in problem.budget.metrics} for i in range(len(space.templates))]
    for candidate in space.candidates():
        if (total := total_by_definition(problem, candidate)) <= best:
            continue  # whatever it costs
        a, names = space.architecture(candidate), [precision.name for precision in space.precisions_of(candidate)]
        if all(cost.value(a, names) <= limits[metric.key] for metric, cost in costs[candidate.template].items()):
            best = total
    return best


def total_by_definition(problem: Problem, candidate: Candidate) -> float:
    a = problem.space.architecture(candidate)
    cut = min(a.embedding_width, a.blocks[0].width)
    parts = []
    for block, choice in zip(a.blocks, candidate.choices, strict=True):
        value, precision = problem.score.block_total(a, block, a.layers, cut), problem.space.precision_of(choice)
        assert precision is not None
        parts.append(value - round(precision.lost * abs(value) * 2**30) / 2**30)
    return problem.score.factor(a.blocks[-1].width) * math.fsum(parts)


def test_the_optimum_is_that_of_brute_force_on_240_random_instances(write_table: WriteTable) -> None:
    """Limits are costs of random architectures. So budgets bind, are met with equality, or cannot be met."""
    rng, solved, mixed = random.Random(0), 0, 0
    for number in range(SPACES):
        space = random_space(rng)
        timed = tables(write_table, space) if number % 3 == 0 else {}
        more = tuple(timed[p.name] for p in space.precisions if p.name != "int8") if timed else ()
        cost_model = CostModel("int8", timed.get("int8"), more_tables=more)
        for _ in range(DRAWS):
            keys = rng.sample((*COUNTED, *TIMED, *TIMED) if timed else COUNTED, rng.randint(1, 3))
            free = Problem(space, Budget.of(dict.fromkeys(keys, 1e18)), parse_score(rng.choice(SCORES)), cost_model)
            factor = rng.choice((1.0, 0.97, 1.2))
            limits = {metric.key: factor * free.value(metric, space.sample(rng)) for metric in free.budget.metrics}
            problem = free.limited(Budget.of(limits))
            certificate = ExactSolver(problem).solve()
            best = best_by_definition(problem, limits)
            assert certificate.gap_percent == 0
            if best == -math.inf:
                assert certificate.infeasible
                continue
            assert certificate.candidate is not None and problem.feasible(certificate.candidate)
            assert certificate.score == certificate.bound == pytest.approx(best, rel=1e-12)
            assert total_by_definition(problem, certificate.candidate) == pytest.approx(certificate.score, rel=1e-12)
            solved += 1
            mixed += len({p.name for p in space.precisions_of(certificate.candidate)}) > 1
    assert solved >= 200 and mixed >= 10


# Every kind of choice is open: 4,752 architectures.
OPEN = replace(
    MIXED,
    name="open",
    blocks=(1, 2),
    widths=(128, 192),
    ffn_ratios=(2.5,),
    layers=(1, 3),
    shared=(False,),
    ffn=("swiglu",),
    embedding_widths=(128,),
    precisions=ALL,
)
SMALLER = replace(SMALL, name="smaller", blocks=(2,), widths=(128, 256), layers=(1, 2), precisions=ALL)


def test_bits_vocabulary_kv_heads_context_and_shape_are_chosen_at_once(write_table: WriteTable) -> None:
    timed = tables(write_table, OPEN)
    cost_model = CostModel("int8", timed["int8"], more_tables=(timed["int4"], timed["fp16"]))
    names = ("text_ms@64", "weight_mb@int8", "kv_mb")
    free = Problem(OPEN, Budget.of(dict.fromkeys(names, 1e18)), parse_score("calibrated"), cost_model)
    rng, chosen = random.Random(3), set()
    for _ in range(4):
        limits = {metric.key: free.value(metric, OPEN.sample(rng)) for metric in free.budget.metrics}
        problem = free.limited(Budget.of(limits))
        certificate, best = ExactSolver(problem).solve(), brute_force(problem)
        assert certificate.score == certificate.bound == pytest.approx(best.bound, rel=1e-12)
        if certificate.candidate is not None:
            template = OPEN.templates[certificate.candidate.template]
            blocks = OPEN.architecture(certificate.candidate).blocks
            precisions = OPEN.precisions_of(certificate.candidate)
            chosen |= {("vocabulary", template.vocabulary.size), ("context", template.context)}
            chosen |= {("kv", block.heads // block.kv_heads) for block in blocks} | {(p.name, 0) for p in precisions}
    assert len({kind for kind, _ in chosen if kind in NATS}) >= 2 and len(chosen) >= 6


def test_minimum_front_and_evolution_choose_bits_too() -> None:
    budget = Budget.of({"weight_mb@int8": 3.0, "flops": 2.5e9})
    problem = Problem(SMALLER, budget, parse_score("calibrated"), CostModel("int8"))
    metric = Metric("weight_mb", "int8")
    cheapest = minimum(problem, metric)
    values = {g: problem.value(metric, g) for g in SMALLER.candidates() if problem.value(Metric("flops"), g) <= 2.5e9}
    assert cheapest is not None and cheapest[0] == min(values.values())
    totals = {g: total_by_definition(problem, g) for g in values}
    front = pareto_front(problem, metric, 12)
    for point in front.points:
        assert point.score == pytest.approx(max(totals[g] for g in values if values[g] <= point.limit), rel=1e-12)
    assert len({p.name for point in front.points for p in SMALLER.precisions_of(point.candidate)}) >= 2
    optimum = ExactSolver(problem).solve().score
    best = [evolve(problem, iterations=3000, seed=seed).candidate for seed in range(3)]
    assert all(g is not None and problem.feasible(g) for g in best)
    assert max(problem.total(g) for g in best if g is not None) == pytest.approx(optimum, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_times_are_those_of_the_step_time_model_on_sums_over_all_tables(
    write_piecewise: WriteTable, write_table: WriteTable, seed: int
) -> None:
    """Warm and cold entries and bytes are summed, each part by the table of its precision."""
    first = write_piecewise(SMALLER, "int8", seed=seed)
    others = {name: write_table(SMALLER, name, slowness=s, step_time=single(WARM)) for name, s in SLOWNESS.items()}
    more = others["int4"], others["fp16"]
    problem = Problem(SMALLER, Budget(), parse_score("calibrated"), CostModel("int8", first, more_tables=more))
    rng = random.Random(seed)
    for candidate in (SMALLER.sample(rng) for _ in range(20)):
        a, whole = SMALLER.architecture(candidate), first.sums(SMALLER.architecture(candidate), 64)
        names = [precision.name for precision in SMALLER.precisions_of(candidate)]
        warm, cold, mb = whole
        for block, name in zip(a.blocks, names, strict=True):
            own, usual = (sums_of_block(table, a, block) for table in ({**others, "int8": first}[name], first))
            warm, cold, mb = warm + own[0] - usual[0], cold + own[1] - usual[1], mb + own[2] - usual[2]
        assert first.step_time is not None
        expected = first.step_time.value(Sums(warm, cold, mb))
        assert problem.value(Metric("decode_ms", 64), candidate) == pytest.approx(expected, rel=1e-6)


def sums_of_block(table: LatencyTable, a: Any, block: Any) -> tuple[float, float, float]:
    """Warm and cold entries of a block [ms], and the bytes that a step reads for it [MB]."""
    warm, cold = (
        replace(table, step_time=single(piece)).block_cost(a, block, Step("decode", 64)) for piece in (WARM, COLD)
    )
    return warm, cold, counts.block_step_bytes(a, block, table.precision, 64) / 1e6


def test_a_block_at_the_searchs_precision_costs_what_it_costs_without_a_choice(write_table: WriteTable) -> None:
    table = write_table(SMALLER, "int8")
    plain = replace(SMALLER, precisions=())
    single_choice = replace(SMALLER, precisions=(BlockPrecision("int8", 0.0),))
    budget = Budget.of({"decode_ms@64": 3.0, "weight_mb": 1.5, "peak_mb@64": 6.0})
    found = [
        ExactSolver(Problem(space, budget, parse_score("calibrated"), CostModel("int8", table))).solve()
        for space in (plain, single_choice)
    ]
    assert found[0].candidate == found[1].candidate and found[0].score == found[1].score


def test_weights_are_counted_at_each_blocks_precision_and_nothing_else_changes() -> None:
    problem, plain = (
        Problem(space, Budget(), parse_score("calibrated"), CostModel("int8", target="rtx"))
        for space in (SMALLER, replace(SMALLER, precisions=()))
    )
    rng, seen = random.Random(1), set()
    for candidate in (SMALLER.sample(rng) for _ in range(30)):
        a, names = SMALLER.architecture(candidate), [p.name for p in SMALLER.precisions_of(candidate)]
        unrounded = Candidate(candidate.template, tuple(choice // len(ALL) for choice in candidate.choices))
        for base in ("int4", "fp16"):
            metric = Metric("weight_mb", base)
            counted = counts.weight_bytes(a, base, "rtx", names) / 1e6
            assert problem.value(metric, candidate) == pytest.approx(counted, abs=1e-6)
            seen.add(counted != counts.weight_bytes(a, base, "rtx") / 1e6)
        for key in ("kv_mb", "parameters", "flops"):
            assert problem.value(Metric(key), candidate) == plain.value(Metric(key), unrounded)
        more = problem.value(Metric("weight_mb", "int8"), candidate) - plain.value(
            Metric("weight_mb", "int8"), unrounded
        )
        peaks = problem.value(Metric("peak_mb", 64), candidate), plain.value(Metric("peak_mb", 64), unrounded)
        assert peaks[0] - peaks[1] == pytest.approx(more, abs=1e-6)
    assert True in seen


def test_a_block_is_held_in_memory_as_at_its_own_precision() -> None:
    """So the engine of a CPU holds a float16 block again while it loads, whatever the precision of the others."""
    a = SMALLER.models[0]
    sums = {name: peak_sums(name, "onnxruntime", 64) for name in counts.PRECISIONS}
    for base, own in itertools.product(counts.PRECISIONS, repeat=2):
        for mixed, plain in zip(sums[base], sums[own], strict=True):
            assert mixed.block(a, a.blocks[0], own) == plain.block(a, a.blocks[0], None)


def test_rounding_lowers_a_score_of_any_sign() -> None:
    for value, lost, left in ((100.0, 0.25, 75.0), (-100.0, 0.25, -125.0), (0.0, 0.5, 0.0)):
        score = Score("mine", block=lambda model, block, depth, cut, value=value: value)  # type: ignore[misc]
        a = SMALLER.architecture(SMALLER.sample(random.Random(0)))
        assert score.block_total(a, a.blocks[0], a.layers, 128, lost) == left
        assert score.total(a, [lost] * 2) == 2 * left


def test_the_measured_loss_is_layers_for_nats() -> None:
    """A model of a share `lost` fewer parameters has a loss as much higher as rounding makes it (docs/study.md)."""
    for name, nats in NATS.items():
        lost = measured(name).lost
        assert -NATS_PER_LOG_PARAMETERS * math.log(1 - lost) == pytest.approx(nats, abs=1e-15)
    assert [measured(name).lost for name in ("fp32", "fp16")] == [0, 0]
    assert 0 < measured("int8").lost < 0.01 < measured("int4").lost < 0.25


# --- files, options and refusals -------------------------------------------------------------------


def test_a_space_file_lists_precisions_and_older_files_have_none(tmp_path: Path) -> None:
    form = space_file.to_dict(SMALLER)
    assert form["precisions"][0] == {"name": "int4", "lost": measured("int4").lost}
    assert space_file.from_dict(json.loads(json.dumps(form))) == SMALLER
    assert "precisions" not in space_file.to_dict(SMALL) and SMALLER.size == 9 * replace(SMALLER, precisions=()).size
    path = tmp_path / "mine.json"
    mine = {"kind": "space", "schema_version": 2, "name": "mine", "base": "edge", "precisions": "int4"}
    path.write_text(json.dumps({**mine, "precisions": ["int8", {"name": "int4", "lost": 0.25}]}))
    space = load_space(str(path))
    assert space.precisions == (measured("int8"), BlockPrecision("int4", 0.25))
    path.write_text(json.dumps(mine))
    assert load_space(str(path)).precisions == (measured("int4"),)
    assert replace(space, name="edge", precisions=()) == EDGE


BROKEN: list[tuple[Any, type[MerinoError], str]] = [
    (["int3"], InputError, r"precisions \['int3'\]; list some of fp32, fp16, int8, int4, each once"),
    (["int4", "int4"], InputError, "each once"),
    ([{"name": "int4", "lost": math.nan}], InputError, "precision int4 loses nan of a block's score"),
    ([{"name": "int4", "lost": 2}], InputError, "loses 2 of"),
    ([{"name": "int4", "lost": -0.1}], InputError, "loses -0.1 of"),
    ([{"name": "int4", "lost": "much"}], InputError, "loses 'much' of"),
    ([{"name": ["int4"]}], ArtefactError, "it has name and lost"),
    ([{"name": "int4", "cost": 1}], ArtefactError, "it has name and lost"),
    ([4], ArtefactError, "precision 4; it has name and lost"),
]


@pytest.mark.parametrize(("precisions", "error", "words"), BROKEN)
def test_a_precision_that_there_is_not_and_a_loss_that_is_none_are_refused(
    precisions: Any, error: type[MerinoError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        space_file.from_dict({**space_file.to_dict(SMALLER), "precisions": precisions})
    assert "\n" not in str(caught.value)


def test_tables_that_do_not_go_together_are_refused(write_table: WriteTable) -> None:
    int8, int4 = (write_table(SMALLER, name) for name in ("int8", "int4"))

    def problem(*more: LatencyTable, space: Space = SMALLER, first: LatencyTable | None = int8) -> Problem:
        return Problem(
            space, Budget.of({"decode_ms": 9.0}), parse_score("calibrated"), CostModel("int8", first, more_tables=more)
        )

    def other(table: LatencyTable, **header: Any) -> LatencyTable:
        return replace(table, header={**table.header, **header})

    with pytest.raises(
        InputError, match="no table has times of fp16; measure it: merino-edge profile --precision fp16"
    ):
        problem(int4)
    two = replace(SMALLER, precisions=ALL[:2])
    problem(int4, space=two)
    with pytest.raises(InputError, match="is a second table of int4; give one for each precision"):
        problem(int4, int4, space=two)
    with pytest.raises(InputError, match="no table has times of int8"):
        problem(int4, space=two, first=None)
    with pytest.raises(InputError, match=r"was measured in fp16, which no block .* may have.*--bits int4,int8,fp16"):
        problem(int4, write_table(SMALLER, "fp16"), space=two)
    for header in ({"threads": 4}, {"backend": "tensorrt"}, {"cache_buckets": 64}, {"device": {"name": "Another"}}):
        with pytest.raises(InputError, match="measure both alike: merino-edge profile --precision int4"):
            problem(other(int4, **header), space=two)
    wide = replace(two, widths=(128, 256, 512))
    with pytest.raises(InputError, match=r"width 128 to 512 .measured 128 to 256.*--space smaller") as caught:
        problem(int4, space=wide, first=write_table(wide, "int8"))
    assert str(int4.path) in str(caught.value)


def test_what_cannot_be_chosen_by_blocks_is_refused() -> None:
    whole = Score("mine", whole=lambda a: 1.0)
    with pytest.raises(InputError, match="mine is not a sum over blocks, so it cannot say what their precisions cost"):
        Problem(SMALLER, Budget(), whole, CostModel("int8"))
    space = replace(SMALLER, precisions=tuple(map(measured, ("int4", "fp32"))))
    with pytest.raises(UnsupportedError, match="onnxruntime-cuda has no fp32"):
        Problem(space, Budget(), parse_score("calibrated"), CostModel("int8", target="onnxruntime-cuda"))
    with pytest.raises(
        UnsupportedError, match="rtx computes in float16 except at fp32, so blocks of fp32 do not go with"
    ):
        Problem(space, Budget(), parse_score("calibrated"), CostModel("int8", target="rtx"))
    Problem(space, Budget(), parse_score("calibrated"), CostModel("int8", target="onnxruntime"))


def test_the_commands_choose_record_and_repeat_bits(tmp_path: Path, write_table: WriteTable) -> None:
    plain = replace(SMALLER, name="plain", precisions=())
    timed = {name: write_table(plain, name, slowness=slowness) for name, slowness in SLOWNESS.items() if name != "fp32"}
    given = list(itertools.chain(*(("--table", timed[name].path) for name in ("int8", "int4", "fp16"))))
    space, first, again = written(plain, tmp_path), tmp_path / "a.json", tmp_path / "b.json"
    bits = ("--bits", "int4=0.3,int8,fp16", "--precision", "int8")
    done = merino("--space", space, *given, *bits, "--decode-ms", 3.2, "--weight-mb", 1.6, "--out", first)
    document = json.loads(first.read_text())
    precisions = document["choices"]["precisions"]
    assert len(precisions) == 2 and set(precisions) <= set(SLOWNESS) and "bits" in done.stderr
    assert document["space"]["form"]["precisions"][0] == {"name": "int4", "lost": 0.3}
    assert [table["header"]["precision"] for table in document["more_tables"]] == ["int4", "fp16"]
    merino("--from", first, "--out", again)
    assert again.read_bytes() == first.read_bytes()
    altered = {**artefact.remove_envelope(document), "choices": {**document["choices"], "precisions": ["fp32", "fp32"]}}
    artefact.write_json(first, "architecture", altered, 1)
    assert "fp32 fp32, the search found" in merino("--from", first, "--out", tmp_path / "c.json", code=2).stderr
    front = tmp_path / "front.json"
    merino("--space", space, *bits, "--against", "weight_mb", "--points", 6, "--out", front, verb="pareto")
    points = json.loads(front.read_text())["points"]
    assert all(len(point["precisions"]) == 2 for point in points) and len({*map(str, points)}) == len(points)
    for text, words in (
        ("int4,int3", "list some of fp32, fp16, int8, int4"),
        ("int4=nan", "loses nan of a block's score"),
        ("int4=much", "'int4=much' is no precision; write NAME or NAME=SHARE"),
    ):
        done = merino("--space", space, "--bits", text, "--out", tmp_path / "none.json", code=2)
        assert words in " ".join(done.stderr.split())
