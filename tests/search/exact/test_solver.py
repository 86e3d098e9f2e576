"""The exact solver equals brute force by definition, on random spaces, scores and budgets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers.formula_table import whole_cost
from helpers.small_spaces import MIXED, SMALL, near_spaces, spaces
from merino_edge import counts
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.latency.table import LatencyTable
from merino_edge.presets import preset
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import EDGE, PAPER, WIDE
from merino_edge.search.costs import CostModel
from merino_edge.search.exact import label_setting
from merino_edge.search.exact.certificate import Certificate
from merino_edge.search.exact.dominance import _dominates, program_groups, replaced_choices
from merino_edge.search.exact.label_setting import pareto_front
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import Score, effective, parse_score
from merino_edge.search.space import Candidate, Space

WriteTable = Callable[..., LatencyTable]
KEYS = [
    *("parameters", "flops", "weight_mb@int4", "weight_mb@fp16", "kv_mb", "kv_mb@64", "peak_mb@64"),
    *("decode_ms@64", "decode_ms@30", "prefill_ms@64", "text_ms@64", "first_token_ms@100", "energy_mj@20"),
]
NEAR_KEYS = ["parameters", "flops", "weight_mb@fp16", "kv_mb", "kv_mb@64"]
SCORES = ["effective", "cut", "parameters", "flops", "effective:effectiveness_power=3", "effective:shared_layer=0.3"]
SCORES += ["exit", "exit:exit_power=2,shared_layer=0.1"]


def brute_force(problem: Problem, limits: dict[str, float]) -> tuple[float, set[Candidate]]:
    """The highest score and the candidates that have it, from whole architectures and costs by definition."""
    space, table = problem.space, problem.cost_model.table
    assert table is None or isinstance(table, LatencyTable)
    best, found = -math.inf, set()
    for candidate in space.candidates():
        a, per_token = space.architecture(candidate), space.templates[candidate.template].vocabulary.bytes_per_token
        total = problem.score.total(a)
        if total < best * (1 - 1e-12 * math.copysign(1, best)):
            continue  # whatever it costs
        metrics = {metric: limits[metric.key] for metric in problem.budget.metrics}
        vocabulary = space.templates[candidate.template].vocabulary
        if any(problem.cost_model.positions(metric, vocabulary) > a.max_positions for metric in metrics):
            continue
        if any(whole_cost(m.key, a, table, per_token) > limit * (1 + 1e-9) for m, limit in metrics.items()):
            continue
        if any(problem.value(metric, candidate) > limit for metric, limit in metrics.items()):
            continue
        if total > best * (1 + 1e-12 * math.copysign(1, best)):
            best, found = total, set()
        found.add(candidate)
    return best, found


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spaces(),
    st.sampled_from(SCORES),
    st.lists(st.sampled_from(KEYS), max_size=4, unique=True),
    st.integers(0, 2**32),
    st.sampled_from((1.0, 0.97, 1.2)),
)
def test_the_optimum_is_that_of_brute_force(
    write_table: WriteTable, space: Space, spec: str, keys: list[str], seed: int, factor: float
) -> None:
    table = write_table(space, "int8", energy=True) if any(Metric.parse(k).kind.latency for k in keys) else None
    check_optimum(space, spec, keys, table, seed=seed, factor=factor)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    near_spaces(),
    st.sampled_from(SCORES),
    st.lists(st.sampled_from(NEAR_KEYS), min_size=1, max_size=3, unique=True),
    st.integers(0, 2**32),
)
def test_the_optimum_among_near_ties_is_that_of_brute_force(
    space: Space, spec: str, keys: list[str], seed: int
) -> None:
    """Models a percent apart: a dominance that is as much too wide would lose the best of them."""
    check_optimum(space, spec, keys, None, seed=seed, factor=1.0)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spaces(),
    st.sampled_from(SCORES),
    st.sampled_from((["decode_ms@64"], ["text_ms@64"], ["decode_ms@64", "decode_ms@30"], ["text_ms@20", "peak_mb@64"])),
    st.lists(st.sampled_from(("parameters", "kv_mb", "prefill_ms@64", "energy_mj@64")), max_size=2, unique=True),
    st.integers(0, 2**32),
    st.sampled_from((1.0, 0.97, 1.2)),
    st.sampled_from((None, 0, 64)),
)
def test_the_optimum_is_that_of_brute_force_for_a_piecewise_step_time(
    write_piecewise: WriteTable,
    space: Space,
    spec: str,
    keys: list[str],
    more: list[str],
    seed: int,
    factor: float,
    cache_buckets: int | None,
) -> None:
    table = write_piecewise(space, "int8", seed=seed, energy=True, cache_buckets=cache_buckets)
    check_optimum(space, spec, [*keys, *more], table, seed=seed, factor=factor)


def layer_parameters(a: Architecture) -> int:
    return sum(counts.block_parameters(a, block) for block in a.blocks)


def check_optimum(
    space: Space, spec: str, keys: list[str], table: LatencyTable | None, *, seed: int, factor: float
) -> None:
    """Limits are the costs of random architectures. So budgets bind, are met with equality, or cannot be met."""
    rng, cost_model = random.Random(seed), CostModel("int8", table)
    limits = {}
    for key in keys:
        metric, candidate = Metric.parse(key), space.sample(rng)
        if (
            cost_model.positions(metric, space.templates[candidate.template].vocabulary)
            > space.templates[candidate.template].context
        ):
            continue
        value = cost_model.metric_cost(metric, space.templates[candidate.template].vocabulary).value(
            space.architecture(candidate)
        )
        assume(value > 0)  # a piece's constant may make a time negative
        limits[key] = value * factor
    problem = Problem(space, Budget.of(limits), parse_score(spec), cost_model)
    certificate = ExactSolver(problem).solve()
    best, found = brute_force(problem, limits)
    assert certificate.gap_percent == 0
    if not found:
        assert certificate.candidate is None and certificate.infeasible
        return
    assert certificate.score == certificate.bound == pytest.approx(best, rel=1e-12)
    assert certificate.candidate is not None and problem.feasible(certificate.candidate)
    # blocks of one width may stand in any order
    assert certificate.candidate in {Candidate(g.template, tuple(sorted(g.choices))) for g in found}
    metrics = problem.budget.metrics
    # the last tie goes to more weights, unless memory has a budget
    sign = -1 if {"parameters", "weight_mb", "peak_mb"} & {metric.name for metric in metrics} else 1
    if metrics:  # among equal scores the lowest costs win, in the order of the budgets
        architectures = {candidate: space.architecture(candidate) for candidate in {*found, certificate.candidate}}
        costs = {g: tuple(problem.value(metric, g) for metric in metrics) for g, a in architectures.items()}
        assert costs[certificate.candidate] == min(costs.values())
        alike = [g for g, cost in costs.items() if cost == min(costs.values())]
        order = [(-a.max_positions, -sign * layer_parameters(a)) for a in (architectures[g] for g in alike)]
        assert order[alike.index(certificate.candidate)] == min(order)


@pytest.mark.parametrize(("flops", "best"), [(60e9, 8111.66), (110e9, 14521.78), (160e9, 20660.68)])
def test_the_papers_budgets_reach_the_exhaustive_optimum(flops: float, best: float) -> None:
    """Optima over all 304 million architectures, from benchmarks/paper/reconstruct_presets.py."""
    problem = Problem(PAPER, Budget.of({"flops": flops}), effective(), CostModel("fp16"))
    certificate = ExactSolver(problem).solve()
    assert certificate.score == certificate.bound == pytest.approx(best, abs=0.005)
    assert certificate.candidate is not None and PAPER.architecture(certificate.candidate).flops() <= flops


@cache
def solved(space: str, *limits: tuple[str, float]) -> tuple[Problem, Certificate]:
    """A large problem and its optimum, which two tests read."""
    problem = Problem(LARGE[space], Budget.of(dict(limits)), effective(), CostModel("int4"))
    return problem, ExactSolver(problem).solve()


LARGE = {"edge": EDGE, "wide": WIDE, "fewer templates": replace(WIDE, vocabularies=WIDE.vocabularies[::3])}
EDGE_LIMITS = ("weight_mb@int4", 20.0), ("kv_mb@1024", 6.0)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("edge", EDGE_LIMITS),
        ("fewer templates", (("flops", 60e9), ("parameters", 30e6))),
        ("wide", (("weight_mb@int4", 30.0), ("kv_mb@1024", 8.0))),
    ],
)
def test_large_spaces_hold_nothing_better_nearby(name: str, limits: tuple[tuple[str, float], ...]) -> None:
    """Brute force cannot reach these spaces. No change of one or two blocks may refute the proof."""
    space, (problem, certificate) = LARGE[name], solved(name, *limits)
    assert space.size > 10**9
    assert certificate.gap_percent == 0 and certificate.candidate is not None
    candidate, rng = certificate.candidate, random.Random(0)
    from merino_edge.search.evolution import mutate

    for _ in range(8_000):
        other = mutate(space, candidate, rng)
        if rng.random() < 0.5:
            other = mutate(space, other, rng)
        if problem.feasible(other):
            assert problem.total(other) <= certificate.score


def test_the_answer_does_not_depend_on_how_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams only guide the search. Without them, and with other steps, ties give the same candidate."""
    from merino_edge.search.exact import relaxation
    from merino_edge.search.exact import solver as exact

    problem = Problem(PAPER, Budget.of({"flops": 60e9}), effective(), CostModel("fp16"))
    first = ExactSolver(problem).solve()
    monkeypatch.setattr(exact, "BEAM_SUBPROBLEMS", 0)
    monkeypatch.setattr(relaxation, "STEPS", 25)
    monkeypatch.setattr(label_setting, "EXPANSIONS", 1000)
    monkeypatch.setattr(label_setting, "FRONT", 7)
    second = ExactSolver(problem).solve()
    assert (second.candidate, second.score, second.bound) == (first.candidate, first.score, first.bound)


def test_equal_scores_go_to_the_longer_context_where_that_costs_nothing() -> None:
    for limits, context in (({"weight_mb@int4": 20.0}, 2048), ({"weight_mb@int4": 20.0, "kv_mb": 9.0}, 512)):
        problem = Problem(EDGE, Budget.of(limits), effective(), CostModel("int4"))
        candidate = ExactSolver(problem).solve().candidate
        assert candidate is not None and EDGE.templates[candidate.template].context == context


def test_the_cut_keeps_the_solver_from_a_narrow_first_block() -> None:
    """Under a tight weight budget the plain score starts with a 64-wide block (paper section 9)."""
    budget = Budget.of({"weight_mb@int4": 48.0})
    firsts = {}
    for spec in ("effective", "cut"):
        candidate = ExactSolver(Problem(PAPER, budget, parse_score(spec), CostModel("int4"))).solve().candidate
        assert candidate is not None
        firsts[spec] = PAPER.architecture(candidate).blocks[0].width
    assert firsts["effective"] == 64 and firsts["cut"] >= 384


# --- minimum costs, limits of time and memory ------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(spaces(), st.sampled_from(KEYS), st.sampled_from(KEYS), st.integers(0, 2**32))
def test_the_minimum_of_a_metric_is_that_of_brute_force(
    write_table: WriteTable, space: Space, key: str, other: str, seed: int
) -> None:
    check_minimum(space, key, other, seed, write_table(space, "int8", energy=True))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spaces(),
    st.sampled_from(("decode_ms@64", "decode_ms@30", "text_ms@64")),
    st.sampled_from(("decode_ms@64", "parameters", "kv_mb", "energy_mj@20")),
    st.sampled_from((0.01, 3.0)),
    st.integers(0, 2**32),
)
def test_the_minimum_of_a_piecewise_step_time_is_that_of_brute_force(
    write_piecewise: WriteTable, space: Space, key: str, other: str, projection_ms: float, seed: int
) -> None:
    check_minimum(
        space, key, other, seed, write_piecewise(space, "int8", seed=seed, projection_ms=projection_ms, energy=True)
    )


def check_minimum(space: Space, key: str, other: str, seed: int, table: LatencyTable) -> None:
    cost_model, metric, second = CostModel("int8", table), Metric.parse(key), Metric.parse(other)
    candidate = space.sample(random.Random(seed))

    def positions(g: Candidate) -> int:
        vocabulary = space.templates[g.template].vocabulary
        return max(cost_model.positions(metric, vocabulary), cost_model.positions(second, vocabulary))

    assume(positions(candidate) <= space.templates[candidate.template].context)
    limit = cost_model.metric_cost(second, space.templates[candidate.template].vocabulary).value(
        space.architecture(candidate)
    )
    assume(limit > 0)
    budget = Budget(((second, limit),)) if second != metric else Budget(((metric, 1.0),))
    problem = Problem(space, budget.within(metric, 1.0), effective(), cost_model)
    optimum = minimum(problem, metric)
    values = []
    for g in space.candidates():
        a = space.architecture(g)
        if positions(g) <= a.max_positions and (second == metric or problem.value(second, g) <= limit):
            values.append(problem.value(metric, g))
    assume(min(values, default=1) > 0)
    if not values:
        assert optimum is None
    else:
        assert optimum is not None and optimum[0] == pytest.approx(min(values), rel=1e-12)


def test_out_of_time_the_bound_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, optimum = solved("edge", *EDGE_LIMITS)
    at_once = ExactSolver(problem, seconds=1e-9).solve()
    assert at_once.candidate is not None and problem.feasible(at_once.candidate) and not at_once.infeasible
    assert at_once.score <= optimum.score <= at_once.bound < math.inf and 0 < at_once.gap_percent < math.inf

    calls = 0

    def stop(step: str, best: float, bound: float) -> None:
        nonlocal calls
        calls += step == "solving"
        if calls == 2:
            solver.deadline = -1.0

    solver = ExactSolver(problem, on_progress=stop)
    stopped = solver.solve()
    assert stopped.candidate is not None and stopped.score <= optimum.score <= stopped.bound
    assert stopped.bound > optimum.bound and stopped.gap_percent > 0


@pytest.mark.parametrize("space", [EDGE, WIDE], ids=["edge", "wide"])
def test_there_is_a_bound_from_the_start(space: Space) -> None:
    """Even with the score and the budget that take longest. The time that is left to the solver is none."""
    problem = Problem(space, Budget.of({"peak_mb@256": 60.0}), parse_score("calibrated"), CostModel("int4"))
    certificate = ExactSolver(problem, seconds=1e-9).solve()
    assert certificate.candidate is not None and problem.feasible(certificate.candidate)
    assert certificate.score < certificate.bound < math.inf


def test_too_many_labels_leave_a_gap_and_no_wrong_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(PAPER, Budget.of({"flops": 60e9, "parameters": 50e6}), effective(), CostModel("fp16"))
    optimum = ExactSolver(problem).solve()
    monkeypatch.setattr(label_setting, "MAX_LABELS", 40)
    limited = ExactSolver(problem).solve()
    assert limited.score <= optimum.score <= limited.bound and limited.gap_percent > 0


def test_only_sums_over_blocks_are_solved() -> None:
    whole = Score("mine", whole=lambda a: 1.0)
    with pytest.raises(InputError, match=r"mine is not a sum over blocks.*--solver evolution"):
        ExactSolver(Problem(SMALL, Budget(), whole, CostModel("fp16")))


def test_scores_may_be_negative_and_see_the_template() -> None:
    """A user's score that prefers fewer layers and the larger of two vocabularies."""
    score = Score("mine", block=lambda model, block, depth, cut: model.vocab_size / 1e6 - block.layers - depth / 7)
    problem = Problem(MIXED, Budget.of({"parameters": 2e6}), score, CostModel("fp16"))
    certificate = ExactSolver(problem).solve()
    best = max(score.total(MIXED.architecture(g)) for g in MIXED.candidates() if problem.feasible(g))
    assert certificate.score == certificate.bound == pytest.approx(best) and best < 0


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=60), st.integers(1, 3))
@settings(max_examples=100)
def test_the_front_is_what_nothing_before_undercuts(rows: list[tuple[int, ...]], columns: int) -> None:
    """Rows of a score, which falls, and of costs that are a thousandth apart."""
    ordered = sorted({(-row[0], *row[1 : 1 + columns]) for row in rows})
    costs = [np.array([1000 + row[k] for row in ordered], float) for k in range(1, 1 + columns)]
    kept = [
        i
        for i, (_, *row) in enumerate(ordered)
        if not any(all(x <= y for x, y in zip(other, row, strict=True)) for _, *other in ordered[:i])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_setting, "FRONT", 5)
        assert pareto_front(costs).tolist() == kept


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(near_spaces(), st.lists(st.sampled_from(NEAR_KEYS), min_size=1, max_size=3, unique=True), st.integers(0, 2**32))
def test_a_program_is_left_out_only_for_one_that_no_path_makes_dearer(space: Space, keys: list[str], seed: int) -> None:
    cost_model, a = CostModel("int8"), space.architecture(space.sample(random.Random(seed)))
    limits = {key: cost_model.metric_cost(Metric.parse(key), space.vocabularies[0]).value(a) for key in keys}
    problem = Problem(space, Budget.of(limits), effective(), cost_model)
    programs = [program for template in problem.templates for program in problem.programs(template)]
    paths = [(c, [space.width_of[choice] for choice in c.choices]) for c in space.candidates()]
    for group in program_groups(problem)[0]:
        for other in (programs[number] for number in group.numbers):
            for candidate, widths in paths:
                if candidate.template == other.template:
                    cost = group.program.units(candidate.choices, widths)
                    assert (cost <= other.units(candidate.choices, widths)).all()


@pytest.mark.parametrize("part", ["start", "finish", "changes", "block_costs", "activations"])
def test_a_program_that_is_a_thousandth_cheaper_in_one_part_is_not_left_out(part: str) -> None:
    problem = Problem(MIXED, Budget.of({"flops": 1e12, "peak_mb@64": 1e9}), effective(), CostModel("int8"))
    programs = [problem.programs(template)[0] for template in problem.templates]
    program = max(programs, key=lambda program: len(program.widths))
    costs = getattr(program, part)
    of_its_own = {"block_costs": program.block_costs.copy()}
    cheaper = replace(program, **{**of_its_own, part: costs * np.where(costs > 0, 0.999, 1.001)})
    assert _dominates(problem, cheaper, program) and not _dominates(problem, program, cheaper)


@given(
    st.lists(st.tuples(*[st.integers(1000, 1004)] * 4), min_size=1, max_size=25),
    st.integers(1, 2),
    st.integers(1, 2),
)
@settings(max_examples=100)
def test_a_replaced_choice_is_one_that_another_replaces(rows: list[tuple[int, ...]], depths: int, columns: int) -> None:
    """By definition, for scores and costs a thousandth apart. The last of them all is never replaced."""
    scores = np.array([row[:depths] for row in rows], float).T
    costs = np.array([row[2 : 2 + columns] for row in rows], float)
    replaced = replaced_choices(scores, costs, np.zeros(len(rows), np.int64))
    for depth in range(depths):
        for i in range(len(rows)):
            undercut = [
                j
                for j in range(len(rows))
                if (costs[j] <= costs[i]).all()
                and (
                    scores[depth, j] > scores[depth, i]
                    or (scores[depth, j] == scores[depth, i] and ((costs[j] < costs[i]).any() or j < i))
                )
            ]
            assert replaced[depth, i] == bool(undercut)


def test_smollm2s_parameters_buy_more_entropy_than_it_has() -> None:
    """The optimum under SmolLM2's own costs cannot score below SmolLM2, whose blocks are in this space."""
    smollm2 = preset("smollm2-135m")
    space = replace(
        WIDE,
        name="around",
        blocks=(5,),
        widths=(576,),
        ffn_ratios=(2, 1536 / 576),
        embedding_widths=(576,),
        kv_groups=(1, 3),
        vocabularies=tuple(replace(v, size=49152) for v in WIDE.vocabularies[-1:]),
    )
    budget = Budget.of({"parameters": smollm2.parameters, "weight_mb@fp16": smollm2.weight_bytes("fp16") / 1e6})
    certificate = ExactSolver(Problem(space, budget, effective(), CostModel("fp16"))).solve()
    assert certificate.score >= effective().total(smollm2)
