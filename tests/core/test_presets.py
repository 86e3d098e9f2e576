from __future__ import annotations

from dataclasses import replace

import pytest

from merino_edge.errors import InputError
from merino_edge.presets import PRESETS, preset
from merino_edge.search.builtin_spaces import PAPER

# As counted from the published checkpoints.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "gpt2": 124_439_808,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "cerebras-gpt-111m": 111_050_496,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_public_models_have_the_published_parameters(name: str, parameters: int) -> None:
    assert preset(name).parameters == parameters


@pytest.mark.parametrize(
    ("name", "head", "gflops"),
    [
        ("opt-125m", False, 213),
        ("opt-350m", False, 722),
        ("gpt2", True, 292),
        ("pythia-70m", True, 104),
        ("cerebras-gpt-111m", True, 256),
        ("pythia-160m", True, 292),
    ],
)
def test_flops_explain_the_papers_column(name: str, head: bool, gflops: int) -> None:
    """The paper's column mixes FLOPs without the output head and with it (paper section 6)."""
    assert round(preset(name).flops(1024, head=head) / 1e9) == gflops


@pytest.mark.parametrize(
    ("name", "shared", "unshared", "budget"),
    [("merino-52m", 52, 59, 60e9), ("merino-61m", 61, 79, 110e9), ("merino-64m", 64, 100, 160e9)],
)
def test_reconstructions_fit_the_papers_figures_and_space(name: str, shared: int, unshared: int, budget: float) -> None:
    a = preset(name)
    assert round(a.parameters / 1e6) == shared
    own = replace(a, blocks=tuple(replace(block, shared=False) for block in a.blocks))
    assert round(own.parameters / 1e6) == unshared
    assert 0.95 * budget <= a.flops() <= budget
    assert set(a.blocks) <= set(PAPER.block_choices) and replace(a, blocks=PAPER.block_choices[:1]) == PAPER.models[0]


def test_every_preset_has_a_shape_of_its_own() -> None:
    assert len({preset(name).id for name in PRESETS}) == len(PRESETS) == 10


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match="gpt2"):
        preset("gpt-2")
