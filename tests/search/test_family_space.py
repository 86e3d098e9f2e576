"""Every model of a family's space can leave as that family, and the space holds nothing else."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from merino_edge import checkpoint
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.convert.to_huggingface import export_to_huggingface, one_block
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.errors import InputError
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import DEMO, EDGE, SPACES, load_space
from merino_edge.search.family_space import FAMILIES, as_family
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import DEFAULT, parse_score
from merino_edge.search.space import Space
from merino_edge.search.space_file import from_dict, to_dict
from merino_edge.weights import random_weights

IN_TRANSFORMERS = {"gemma3": "gemma3_text"}
IN_GGUF = FAMILIES.keys() - {"opt"}  # llama.cpp has no OPT


def small(space: Space) -> Space:
    """The same space with models that are written in no time."""
    return dataclasses.replace(space, widths=space.widths[:2], embedding_widths=space.embedding_widths[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_of_the_space_leaves_as_its_family(family: str, tmp_path: Path) -> None:
    space, rng = small(as_family(DEMO, family)), random.Random(0)
    tokenizer = train_tokenizer(iter(["a few words of text"]), 300).to_str()
    for index in range(3):
        a = space.architecture(space.sample(rng))
        source, out = tmp_path / f"{index}", tmp_path / f"{index}-hf"
        checkpoint.save(source, a, random_weights(a), tokenizer_json=tokenizer, chat=chat_format(), training={})
        written = export_to_huggingface(source, out)
        assert written.family == IN_TRANSFORMERS.get(family, family) and written.copied_layers == 0
        assert written.architecture == one_block(a, "") == a
    if family in IN_GGUF:
        assert export_to_gguf(source, tmp_path / "a.gguf").family == family
        assert import_model(tmp_path / "a.gguf", tmp_path / "again") == a


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_builtin_space_has_every_family_by_name(name: str, family: str) -> None:
    space, whole = load_space(f"{name}-{family}"), SPACES[name]
    assert space == as_family(whole, family) and from_dict(to_dict(space)) == space
    depths = {sum(layers) for layers in ((whole.layers[0],) * whole.blocks[0], (whole.layers[-1],) * whole.blocks[-1])}
    assert depths == {space.layers[0], space.layers[-1]}
    for template in range(len(space.templates)):
        widths = [space.widths[w] for w in space.width_range(template)]
        assert widths == [space.templates[template].embedding_width]


def test_an_unknown_family_is_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match="no family 'lama'") as refusal:
        as_family(EDGE, "lama")
    assert refusal.value.hint.startswith("did you mean llama?")


def test_the_exact_solver_proves_the_best_of_a_family() -> None:
    space = as_family(DEMO, "llama")
    budget = Budget(((Metric("parameters"), 2.5e6),))
    result = run_search(SearchConfig(space, budget, parse_score(DEFAULT), "fp32"))
    best = max((c for c in space.candidates() if result.problem.feasible(c)), key=lambda c: result.problem.total(c))
    assert result.problem.total(best) == result.problem.total(result.candidate)
    (block,) = result.architecture.blocks
    assert block.width == result.architecture.embedding_width
