"""Costs of a target: sums stay exact, optima under them equal brute force, and what does not fit is refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from helpers.small_spaces import MIXED, SMALL
from merino_edge import counts
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.export.tensorrt import PREFILL_CHUNK
from merino_edge.graph_io import MAX_LOGIT_ROWS
from merino_edge.runtime.engines import onnx_engine
from merino_edge.search.brute_force import brute_force
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import DEMO, EDGE
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.peak_memory import CPU_CHUNK, ENGINE_CHUNK, ENGINE_ROWS
from merino_edge.search.problem import Problem
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import effective
from merino_edge.storage import TARGET_RULES, target_of_table

PAIRS = [(name, precision) for name, rules in TARGET_RULES.items() for precision in rules.precisions]


def problem_of(space: object, target: str, precision: str, limits: dict[str, float]) -> Problem:
    return Problem(space, Budget.of(limits), effective(), CostModel(precision, target=target))  # type: ignore[arg-type]


@pytest.mark.parametrize(("target", "precision"), PAIRS)
def test_sums_over_parts_equal_whole_architectures(target: str, precision: str) -> None:
    keys = ["weight_mb", "kv_mb", "peak_mb@64"]
    problem, rng = problem_of(EDGE, target, precision, dict.fromkeys(keys, 1e9)), random.Random(0)
    for _ in range(20):
        candidate = EDGE.sample(rng)
        a, (program,) = EDGE.architecture(candidate), problem.programs(candidate.template)
        units = program.units(candidate.choices, [EDGE.width_of[choice] for choice in candidate.choices])
        assert round(units[0]) == a.weight_bytes(precision, target)
        assert units[1] == a.kv_bytes(element_bytes=counts.cache_element_bytes(precision, target))
        peak = max(units[[k for k, metric in enumerate(program.metrics) if metric == 2]])
        assert peak / 1e6 == problem.value(problem.budget.metrics[2], candidate)
        assert peak > units[0] + units[1] or target == "onnxruntime"  # which may hold less of a table than is stored


@pytest.mark.parametrize(("target", "precision"), [("onnxruntime", "int4"), ("onnxruntime", "fp16"), ("rtx", "int8")])
@pytest.mark.parametrize("seed", range(2))
def test_the_optimum_under_a_targets_budgets_equals_brute_force(target: str, precision: str, seed: int) -> None:
    rng, space = random.Random(seed), (SMALL, MIXED)[seed % 2]
    model, keys = CostModel(precision, target=target), ("peak_mb@64", "weight_mb", "kv_mb")
    metrics = [model.resolve(Metric.parse(key), space) for key in rng.sample(keys, rng.randint(1, 3))]
    draws = [space.sample(rng) for _ in range(30)]
    open_problem = problem_of(space, target, precision, {})
    limits = {
        metric.key: sorted(open_problem.value(metric, candidate) for candidate in draws)[rng.randint(3, 15)]
        for metric in metrics
    }
    problem = problem_of(space, target, precision, limits)
    found, best = ExactSolver(problem).solve(), brute_force(problem)
    assert found.infeasible == best.infeasible
    assert found.score == pytest.approx(best.score, rel=1e-9) or found.infeasible


@pytest.mark.parametrize("target", ["onnxruntime", "rtx"])
def test_the_least_peak_memory_equals_brute_force(target: str) -> None:
    problem, metric = problem_of(SMALL, target, "fp16", {"peak_mb@64": 1e9}), Metric("peak_mb", 64)
    least = minimum(problem, metric)
    assert least is not None
    assert least[0] == min(problem.value(metric, candidate) for candidate in SMALL.candidates())


def test_a_result_has_its_target_and_an_older_one_has_none() -> None:
    budget = Budget.of({"weight_mb@int4": 5.0})
    found = run_search(SearchConfig(SMALL, budget, effective(), "int4", target="rtx"))
    document = found.document()
    assert document["target"] == "rtx" and SearchConfig.of(document, "r.json").target == "rtx"
    assert document["costs"]["kv_mb"] == found.architecture.kv_bytes() / 1e6
    del document["target"]
    older = SearchConfig.of(document, "r.json")
    assert older.target is None
    bytes_without = found.architecture.weight_bytes("int4")
    assert 1e6 * older.problem().costs(found.candidate)["weight_mb@int4"] == bytes_without
    assert 1e6 * document["costs"]["weight_mb@int4"] == found.architecture.weight_bytes("int4", "rtx") > bytes_without
    with pytest.raises(ArtefactError, match=r"r.json does not say how it was found"):
        SearchConfig.of({**document, "target": ["rtx"]}, "r.json")
    with pytest.raises(UnsupportedError, match="unknown target 'orin'; choose one of onnxruntime, "):
        SearchConfig.of({**document, "target": "orin"}, "r.json").problem()


HEADERS = [
    ({"backend": "onnxruntime-cpu"}, "onnxruntime"),
    ({"backend": "onnxruntime-cuda"}, "onnxruntime-cuda"),
    ({"backend": "tensorrt-rtx", "libraries": {"tensorrt-rtx-cu12-bindings": "1.7.0"}}, "rtx"),
    ({"backend": "tensorrt", "libraries": {"tensorrt": "10.3.0"}}, "jetpack-6.2"),
    ({"backend": "tensorrt", "libraries": {"tensorrt": "10.16.1.2"}}, "jetpack-7.2"),
    ({"backend": "tensorrt", "libraries": {"tensorrt": "10.30.0"}}, None),
    ({"backend": "tensorrt", "libraries": "?"}, None),
    ({"backend": "torch-cpu"}, None),
    ({"backend": "roofline"}, None),
    ({"backend": "roofline", "target": "jetpack-7.1"}, "jetpack-7.1"),
]


@pytest.mark.parametrize(("header", "target"), HEADERS)
def test_the_target_of_a_table_is_what_it_timed(header: dict[str, object], target: str | None) -> None:
    assert target_of_table(header) == target


def test_activations_are_counted_for_the_steps_that_engines_run() -> None:
    assert onnx_engine.PREFILL_CHUNK == CPU_CHUNK
    assert (PREFILL_CHUNK, MAX_LOGIT_ROWS) == (ENGINE_CHUNK, ENGINE_ROWS)  # and of TensorRT's


def test_what_a_target_cannot_store_is_refused_in_one_line() -> None:
    odd = replace(DEMO, name="odd", ffn_ratios=(1.25,))
    size = next(b.ffn_width for b in odd.block_choices if b.ffn_width % 32)
    with pytest.raises(UnsupportedError, match=rf"rtx stores int4 in blocks of 32 inputs.* odd has {size}; leave it"):
        problem_of(odd, "rtx", "int4", {})
    with pytest.raises(UnsupportedError, match="in blocks of 32"):
        problem_of(odd, "rtx", "fp16", {"weight_mb@int4": 9.0})
    assert math.isfinite(problem_of(odd, "rtx", "int8", {}).cost_model.metric_cost(  # a scale a row
        Metric("weight_mb", "int8"), odd.vocabularies[0]).value(odd.models[0]))  # fmt: skip
    with pytest.raises(UnsupportedError, match="onnxruntime-cuda has no fp32"):
        CostModel("fp32", target="onnxruntime-cuda")
    with pytest.raises(UnsupportedError, match="onnxruntime-cuda has no fp32"):
        problem_of(DEMO, "onnxruntime-cuda", "int4", {"weight_mb@fp32": 9.0})
    with pytest.raises(UnsupportedError, match="unknown target 'orin'"):
        CostModel("int4", target="orin")
