"""The Pareto front equals that of brute force, and public models are placed beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers.small_spaces import MIXED, SMALL, spaces
from merino_edge.errors import BudgetError, InputError, Interrupted
from merino_edge.latency.measurement import Measurement
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable
from merino_edge.presets import preset
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import PAPER, WIDE, vocabularies
from merino_edge.search.costs import CostModel
from merino_edge.search.pareto import Front, pareto_front
from merino_edge.search.problem import Problem
from merino_edge.search.reference_models import PUBLIC, references, value_of
from merino_edge.search.score import effective, parse_score
from merino_edge.search.space import Space, Vocabulary
from merino_edge.unfinished import Unfinished

WriteTable = Callable[..., LatencyTable]


def front(space: Space, key: str, count: int, limits: dict[str, float] | None = None, spec: str = "effective") -> Front:
    problem = Problem(space, Budget.of(limits or {}), parse_score(spec), CostModel("int8"))
    return pareto_front(problem, Metric.parse(key), count)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spaces(),
    st.sampled_from(["parameters", "weight_mb@int4", "kv_mb", "peak_mb@64", "flops"]),
    st.sampled_from(["effective", "cut"]),
)
def test_the_whole_front_is_that_of_brute_force(space: Space, key: str, spec: str) -> None:
    check_front(space, key, spec)


def test_the_minimum_peak_memory_counts_the_activations_of_each_embedding_width() -> None:
    """A past error: the activations of embedding and head were left out, so a wide embedding seemed cheapest."""
    space = replace(
        WIDE,
        blocks=(1,),
        widths=(128, 192),
        ffn_ratios=(1,),
        layers=(1,),
        kv_groups=(1,),
        shared=(False,),
        ffn=("relu",),
        embedding_widths=(64, 128),
        vocabularies=(Vocabulary(512, 2.25),),
        contexts=(64,),
        least_width=0,
        least_embedding=0,
    )
    metric, problem = Metric.parse("peak_mb@64"), Problem(space, Budget(), parse_score("cut"), CostModel("int8"))
    values = [problem.value(metric, g) for g in space.candidates()]
    result = pareto_front(problem, metric, 10)
    assert result.points[0].value == min(values) and len(set(values)) > 1


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(spaces(), st.sampled_from(["decode_ms@64", "text_ms@64"]), st.integers(0, 2**32))
def test_the_whole_front_is_that_of_brute_force_for_a_piecewise_step_time(
    write_piecewise: WriteTable, space: Space, key: str, seed: int
) -> None:
    check_front(space, key, "effective", write_piecewise(space, "int8", seed=seed))


def check_front(space: Space, key: str, spec: str, table: LatencyTable | None = None) -> None:
    small = replace(space, vocabularies=space.vocabularies[:1])
    assume(small.size <= 60)  # every point of its front is a search of its own
    problem, metric = Problem(small, Budget(), parse_score(spec), CostModel("int8", table)), Metric.parse(key)
    costs = {g: problem.value(metric, g) for g in small.candidates()}
    assume(all(cost > 0 for cost in costs.values()))
    result = pareto_front(problem, metric, 10_000)
    assert result.complete
    best = -1e300
    expected = []
    points = sorted(
        ((value, problem.score.total(small.architecture(g))) for g, value in costs.items()),
        key=lambda point: (point[0], -point[1]),
    )
    for value, score in points:
        if score > best * (1 + 1e-12):
            best = score
            expected.append((value, score))
    assert [point.value for point in result.points] == pytest.approx([value for value, _ in expected], rel=1e-12)
    assert [point.score for point in result.points] == pytest.approx([score for _, score in expected], rel=1e-12)


def test_points_are_optimal_for_their_limits_and_spread_over_the_costs() -> None:
    result = front(PAPER, "weight_mb@int4", 12)
    assert len(result.points) == 12 and not result.complete
    assert all(p.value <= p.limit and p.score == p.bound for p in result.points)
    assert all(a.value < b.value and a.score < b.score for a, b in zip(result.points, result.points[1:], strict=False))
    ratios = [b.value / a.value for a, b in zip(result.points, result.points[1:], strict=False)]
    assert max(ratios) < (result.points[-1].value / result.points[0].value) ** 0.3


def test_other_budgets_hold_along_the_front() -> None:
    result = front(MIXED, "parameters", 15, {"kv_mb@128": 0.6})
    kv = Metric("kv_mb", 128)
    for point in result.points:
        assert result.problem.value(kv, point.candidate) <= 0.6
    # The dearest point is found first, however many there shall be.
    limited = front(MIXED, "parameters", 2, {"parameters": 1e6})
    assert limited.points[-1].value <= 1e6 < front(MIXED, "parameters", 2).points[-1].value


def test_what_cannot_be_a_front() -> None:
    with pytest.raises(InputError, match="a front of 1 points"):
        front(SMALL, "parameters", 1)
    with pytest.raises(BudgetError, match="the least possible"):
        front(SMALL, "parameters", 5, {"flops": 1.0})
    with pytest.raises(InputError, match="--decode-ms needs a latency table"):
        front(SMALL, "decode_ms", 5)


# --- public models ---------------------------------------------------------------------------------

AROUND = replace(
    PAPER,
    name="around",
    widths=(256, 512, 1024),
    ffn_ratios=(1, 4),
    kv_groups=(1, 2),
    ffn=("relu", "swiglu"),
    embedding_widths=(512, 768),
    vocabularies=vocabularies(49152, 50272),
)


def test_public_models_cost_by_the_same_table(write_table: WriteTable) -> None:
    table = write_table(AROUND, "fp16")
    found = {r.name: r for r in references(Metric("decode_ms", 64), effective(), CostModel("fp16", table))}
    assert tuple(found) == PUBLIC
    # OPT-125M is of the table's kind; nothing is taken instead.
    opt = found["opt-125m"]
    assert opt.notes == () and opt.value == table.model_cost(preset("opt-125m"), Step("decode", 64))
    assert opt.score == effective().total(preset("opt-125m"))
    # the others differ in what hardly costs time, and say so
    assert found["opt-350m"].notes == ("norm_placement pre",)
    assert found["gpt2"].notes == ("ffn relu",) and found["gpt2"].value is not None
    smollm2 = found["smollm2-135m"]
    assert {"norm layernorm", "positions learned", "rotary_dim 0", "bias all"} <= set(smollm2.notes)
    assert smollm2.value is not None
    parts = table.model_cost(replace(preset("opt-125m"), blocks=preset("opt-125m").blocks), Step("decode", 64))
    assert 0.3 * parts < smollm2.value < 3 * parts
    # a head beyond the measured ones is stretched by its size
    pythia = found["pythia-160m"]
    assert any(note.startswith("head 1.00 times that of 50272 x 768") for note in pythia.notes)


def test_a_public_model_beyond_the_table_has_a_reason_instead_of_a_value(write_table: WriteTable) -> None:
    table = write_table(SMALL, "fp16")  # heads of 32
    for reference in references(Metric("decode_ms", 64), effective(), CostModel("fp16", table)):
        assert reference.value is None and reference.notes == ("the table has heads of 32, not 64",)
    narrow = write_table(replace(AROUND, widths=(256, 512), embedding_widths=(512,)), "fp16")
    value, notes = value_of(preset("opt-125m"), Metric("decode_ms", 64), CostModel("fp16", narrow))
    assert value is None and "width" in notes[0]
    ungated = write_table(replace(AROUND, ffn=("relu",)), "fp16")
    assert value_of(preset("smollm2-135m"), Metric("decode_ms", 64), CostModel("fp16", ungated)) == (
        None,
        ("the table has no gated FFN",),
    )


def test_a_public_model_that_was_measured_has_that_time(write_table: WriteTable) -> None:
    table = write_table(SMALL, "fp16")
    a = preset("opt-125m")
    for length, ms in ((32, 3.0), (128, 6.0)):
        shape = {"architecture": replace(a, max_positions=128).to_dict()}
        table.measurements.append(Measurement("public", "decode", length, shape, (ms,)))
    cost_model = CostModel("fp16", table)
    assert value_of(a, Metric("decode_ms", 64), cost_model) == (4.0, ())  # between the two lengths
    assert value_of(a, Metric("decode_ms", 16), cost_model)[0] is None
    assert value_of(preset("opt-350m"), Metric("decode_ms", 64), cost_model)[0] is None


def test_counted_metrics_need_no_table_and_text_needs_more() -> None:
    cost_model = CostModel("int4")
    assert value_of(preset("gpt2"), Metric("parameters"), cost_model) == (preset("gpt2").parameters, ())
    assert value_of(preset("gpt2"), Metric("kv_mb", 2048), cost_model) == (None, ("it has 1024 positions",))
    value, notes = value_of(preset("gpt2"), Metric("weight_mb", "int4"), cost_model)
    assert value == pytest.approx(preset("gpt2").weight_bytes("int4") / 1e6) and notes == ()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_front_goes_on_to_the_same_points(tmp_path: Path, stop: int) -> None:
    problem, metric = Problem(SMALL, Budget.of({}), parse_score("effective"), CostModel("int8")), Metric.parse("flops")
    whole, solved = pareto_front(problem, metric, 8), list[str]()

    def run(*, resume: bool, most: int) -> Front:
        with Unfinished(tmp_path / "out", 1, resume=resume) as unfinished:

            def part(name: str, make: Callable[[], Any]) -> Any:
                if name not in unfinished.parts:
                    if len(solved) == most:
                        raise KeyboardInterrupt
                    solved.append(name)
                return unfinished.part(name, make)

            return pareto_front(problem, metric, 8, part=part)

    with pytest.raises(Interrupted, match="add --continue"):
        run(resume=False, most=stop)
    found = run(resume=True, most=99)
    assert (found.points, found.complete) == (whole.points, whole.complete) and len(solved) == len(set(solved))
    assert list(tmp_path.iterdir()) == []
