from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.small_spaces import MIXED
from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.presets import PRESETS, preset
from merino_edge.search.builtin_spaces import PAPER
from merino_edge.search.entropy import Hyperparameters, matrix_entropy
from merino_edge.search.score import FLOPS, PARAMETERS, RESOLUTION, effective, narrowest_cut, parse_score


@pytest.mark.parametrize("name", PRESETS)
def test_the_effective_score_is_the_papers_sum_over_computed_layers(name: str) -> None:
    """Summed layer by layer from the definition (paper section 4); each layer is rounded to 2^-20 nats."""
    a, total = preset(name), 0.0
    for layer in a.layer_blocks():
        kv_width = layer.kv_heads * a.head_dim
        shapes_mha = [(layer.width, layer.width)] * 2 + [(layer.width, kv_width)] * 2
        shapes_ffn = [(layer.width, layer.ffn_width)] * (3 if a.ffn == "swiglu" else 2)
        h_mha = sum(matrix_entropy(*shape, 700.0) for shape in shapes_mha)
        h_ffn = sum(matrix_entropy(*shape, 700.0) for shape in shapes_ffn)
        total += 0.57 * (1 - a.layers / 16 / math.log2(layer.width)) * h_mha
        total += 0.43 * (1 - a.layers / 16 / math.log2(layer.ffn_width)) * h_ffn
    assert effective().total(a) == pytest.approx(total, abs=a.layers * RESOLUTION)


def test_sharing_weights_does_not_change_the_entropy_and_does_the_parameters() -> None:
    a = preset("merino-52m")
    own = replace(a, blocks=tuple(replace(block, shared=False) for block in a.blocks))
    assert effective().total(a) == effective().total(own) and FLOPS.total(a) == FLOPS.total(own)
    assert PARAMETERS.total(a) < PARAMETERS.total(own)


def test_the_cut_is_the_narrowest_width_and_costs_all_that_stands_behind_it() -> None:
    uniform, narrow = preset("opt-125m"), preset("merino-52m")
    assert narrowest_cut(uniform) == 768 and effective(cut=True).total(uniform) == effective().total(uniform)
    assert narrowest_cut(narrow) == 384 and effective(cut=True).total(narrow) < 0.75 * effective().total(narrow)
    assert narrowest_cut(preset("opt-350m")) == 512  # there the embedding is the narrow part
    block = Block(768, 2, 12, 12, 3072)
    wide, first = (
        effective(cut=True).total(
            replace(uniform, blocks=(Block(width, 1, width // 64, width // 64, 4 * width), block))
        )
        for width in (768, 64)
    )
    assert first < wide / 4  # what the exact solver exploits under the plain score (paper section 9)


def test_other_scores_count() -> None:
    for name in PRESETS:
        a = preset(name)
        assert parse_score("parameters").total(a) == sum(counts.block_parameters(a, block) for block in a.blocks)
        assert parse_score("flops").total(a) == sum(counts.block_flops(a, block, 1024) for block in a.blocks)


def test_scores_tie_where_they_tie_on_paper() -> None:
    """2 + 4 layers equal 3 + 3 layers. Without rounding to a grid the last bits would decide."""
    blocks = {layers: Block(512, layers, 8, 8, 1536, shared=True) for layers in (2, 3, 4)}
    a = PAPER.models[0]
    options = ("", ":epsilon_squared=3,effectiveness_power=1.7", ":shared_layer=0.3")
    for spec in (f"{name}{option}" for name in ("effective", "cut", "exit") for option in options):
        score = parse_score(spec)
        totals = {
            score.total(replace(a, blocks=tuple(blocks[n] for n in layers))) for layers in ((2, 4), (3, 3), (4, 2))
        }
        assert len(totals) == 1


@pytest.mark.parametrize(
    ("spec", "again"),
    [
        ("effective", "effective"),
        ("cut", "cut"),
        ("effective:", "effective"),
        ("effective:epsilon_squared=700", "effective"),
        ("cut:alpha_mha=1, alpha_ffn=0.5", "cut:alpha_mha=1.0,alpha_ffn=0.5"),
        ("effective:effectiveness_power=2", "effective:effectiveness_power=2.0"),
        ("effective:shared_layer=0.25", "effective:shared_layer=0.25"),
        ("exit:exit_power=0.75", "exit"),
        ("paper", "effective"),
        ("paper:effectiveness_power=2", "effective:effectiveness_power=2.0"),
        ("calibrated", "exit:shared_layer=0.1"),
        ("calibrated:shared_layer=0.2", "exit:shared_layer=0.2"),
        ("counting", "counting"),
        ("counting:exit_power=1,shared_layer=0", "counting:shared_layer=0.0,exit_power=1.0"),
        ("exit:exit_power=1,epsilon_squared=3", "exit:epsilon_squared=3.0,exit_power=1.0"),
    ],
)
def test_a_score_spells_itself_as_it_is_parsed(spec: str, again: str) -> None:
    score = parse_score(spec)
    assert score.spec == again and parse_score(again).spec == again
    assert score.details == parse_score(again).details
    assert score.total(preset("gpt2")) == parse_score(again).total(preset("gpt2"))


def test_the_exit_counts_by_the_last_width_alone() -> None:
    a, entropy = preset("merino-61m"), effective()
    widths = {block.width for block in a.blocks}
    assert len(widths) > 1
    assert parse_score("exit:exit_power=0").total(a) == entropy.total(a)
    assert parse_score("exit").total(a) == pytest.approx(entropy.total(a) * max(widths) ** 0.75, rel=2.0**-12)


@pytest.mark.parametrize("name", ["effective", "cut", "exit"])
def test_a_layer_of_shared_weights_counts_what_it_is_said_to(name: str) -> None:
    """Three of a block's four layers repeat. Share 0 scores one layer, and 1 scores four layers with own weights."""
    a = replace(
        PAPER.models[0], blocks=(Block(256, 2, 4, 4, 512, shared=False), Block(512, 4, 8, 8, 1536, shared=True))
    )
    alone = replace(a, blocks=(a.blocks[0], replace(a.blocks[1], shared=False)))

    def total(share: float, of: Architecture = a) -> float:
        return parse_score(f"{name}:shared_layer={share}").total(of)

    assert total(1) == parse_score(name).total(a) == total(0.3, alone) == total(1, alone)
    assert total(0) < total(0.5) < total(1)
    assert total(0.5) == pytest.approx((total(0) + total(1)) / 2)
    score = parse_score("effective:shared_layer=0")
    second = score.block_total(a, a.blocks[1], a.layers, 256)
    assert second == pytest.approx(score.block_total(a, alone.blocks[1], a.layers, 256) / 4)


def test_counting_is_the_product_that_its_name_says() -> None:
    """Parameters of the layers, a repeated one as a tenth, times the last width to the power of 0.75."""
    a = replace(
        PAPER.models[0], blocks=(Block(256, 2, 4, 4, 512, shared=False), Block(512, 4, 8, 8, 1536, shared=True))
    )
    first, second = counts.block_parameters(a, a.blocks[0]), counts.block_parameters(a, a.blocks[1])
    assert parse_score("counting:exit_power=0").total(a) == first + second + 3 * second * round(102.4) / 1024
    assert parse_score("counting").total(a) == pytest.approx((first + 1.3 * second) * 512**0.75, rel=1e-3)
    assert parse_score("counting:exit_power=0,shared_layer=1").total(a) == first + 4 * second


def test_options_reach_the_formula() -> None:
    squared = effective(Hyperparameters(effectiveness_power=2.0))
    assert squared.total(preset("gpt2")) < effective().total(preset("gpt2"))
    assert squared.details["hyperparameters"]["effectiveness_power"] == 2.0


@pytest.mark.parametrize("spec", [None, 3, ["effective"], Path("mine.py")])
def test_a_score_is_named_by_text(spec: Any) -> None:
    with pytest.raises(InputError, match=r"^there is no score .*; choose one of paper, calibrated, effective"):
        parse_score(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "no score ''"),
        ("entropy", "choose one of paper, calibrated, effective, cut, exit, counting, parameters, flops, MODULE:NAME"),
        ("effective:depth=2", "no option depth; it has alpha_ffn"),
        ("effective:alpha_mha", "'alpha_mha' is no option"),
        ("effective:alpha_mha=much", "write NAME=NUMBER"),
        ("effective:alpha_mha=nan", "alpha_mha is nan"),
        ("effective:epsilon_squared=-1", "epsilon_squared is -1"),
        ("cut:shared_layer=1.5", "shared_layer is 1.5"),
        ("exit:exit_power=nan", "exit_power is nan"),
        ("exit:depth=2", "no option depth; it has alpha_ffn"),
        ("effective:exit_power=1", "no option exit_power"),
        ("parameters:x", "no score 'parameters:x'"),
        ("flops:1", "no score 'flops:1'"),
        ("no.such.module:score", "cannot be loaded (ModuleNotFoundError"),
        ("nowhere.py:score", "nowhere.py does not exist"),
        ("math:tau", "math has no function tau"),
        ("math:hypothenuse", "math has no function hypothenuse"),
    ],
)
def test_scores_that_are_none(spec: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_score(spec)
    assert words in str(caught.value) and "\n" not in str(caught.value)


USERS = """
import math

def heads(model, block, depth, cut):
    return block.layers * block.heads - 0.1 * depth + math.log(cut)

def whole(architecture):
    return -abs(architecture.layers - 5)

def fails(architecture):
    return 1 / 0

def infinite(architecture):
    return math.inf

def words(architecture):
    return "many"

def two(first, second):
    return 0
"""


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USERS)
    return path


def test_a_users_function_is_a_score(users: Path) -> None:
    a = preset("merino-52m")
    additive, whole = parse_score(f"{users}:heads"), parse_score(f"{users}:whole")
    expected = sum(b.layers * b.heads - 0.1 * a.layers + math.log(384) for b in a.blocks)
    assert additive.total(a) == pytest.approx(expected) and additive.block is not None
    assert whole.total(a) == -abs(a.layers - 5) and whole.block is None
    assert additive.details["source_sha256"] == whole.details["source_sha256"]


@pytest.mark.parametrize(
    ("name", "words"), [("fails", "ZeroDivisionError"), ("infinite", "returned inf"), ("words", "ValueError")]
)
def test_a_users_function_that_fails_is_named(users: Path, name: str, words: str) -> None:
    score, a = parse_score(f"{users}:{name}"), MIXED.architecture(MIXED.sample(random.Random(0)))
    with pytest.raises(InputError, match=words) as caught:
        score.total(a)
    assert name in str(caught.value)


def test_a_function_of_other_arguments_is_refused(users: Path) -> None:
    with pytest.raises(InputError, match=r"takes 2 arguments; write NAME.model, block, depth, cut"):
        parse_score(f"{users}:two")
    users.write_text("def broken(:")
    with pytest.raises(InputError, match="SyntaxError"):
        parse_score(f"{users}:broken")


def test_a_score_is_asked_for_what_it_says(users: Path) -> None:
    """A user's function gets the four arguments that the docstring promises."""
    users.write_text(
        "seen = []\n\ndef f(model, block, depth, cut):\n    seen.append((model, block, depth, cut))\n    return 1.0"
    )
    score, a = parse_score(f"{users}:f"), preset("merino-52m")
    assert score.total(a) == len(a.blocks) and score.block is not None
    seen: list[tuple[Architecture, Block, int, int]] = score.block.__globals__["seen"]
    assert [block for _, block, _, _ in seen] == list(a.blocks)
    assert {(depth, cut) for _, _, depth, cut in seen} == {(a.layers, 384)}
