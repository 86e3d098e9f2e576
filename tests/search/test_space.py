from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_spaces import MIXED, SMALL, spaces
from merino_edge import artefact
from merino_edge.architecture import LATER, Architecture
from merino_edge.errors import ArchitectureError, ArtefactError, InputError, MerinoError, UnsupportedError
from merino_edge.search import space_file
from merino_edge.search.builtin_spaces import BYTES_PER_TOKEN, EDGE, PAPER, SPACES, WIDE, load_space
from merino_edge.search.evolution import mutate
from merino_edge.search.space import Candidate, Space

TINY = replace(SMALL, name="tiny", blocks=(2,), ffn_ratios=(1, 4), layers=(1, 3))  # 96 architectures
TWO_BLOCKS = replace(
    MIXED, name="two blocks", blocks=(1, 2), widths=(128, 256), ffn_ratios=(2,), vocabularies=MIXED.vocabularies[:1]
)


def test_paper_space_is_table_5() -> None:
    assert PAPER.size == 304_254_720  # 495 non-decreasing widths x (7 x 4) ** 4
    assert (PAPER.blocks, len(PAPER.widths), len(PAPER.ffn_ratios), PAPER.layers) == ((4,), 9, 7, (1, 2, 3, 4))
    a = PAPER.architecture(PAPER.sample(random.Random(0)))
    assert (a.vocab_size, a.max_positions, a.embedding_width, a.head_dim) == (50272, 2048, 768, 64)
    assert all(block.shared and block.kv_heads == block.heads for block in a.blocks)
    assert PAPER.least_width == PAPER.least_embedding == 0  # the paper's freedom


def test_the_other_spaces_leave_every_dimension_open_and_allow_no_bottleneck() -> None:
    for space in (EDGE, WIDE):
        for name in space_file.DIMENSIONS:
            assert len(getattr(space, name)) > 1, name
        rng = random.Random(0)
        for a in (space.architecture(space.sample(rng)) for _ in range(300)):
            assert a.blocks[0].width >= a.embedding_width / 2 and a.embedding_width >= a.blocks[-1].width / 2
    assert (WIDE.blocks, EDGE.contexts) == (tuple(range(1, 9)), (512, 1024, 2048))
    assert all(v.bytes_per_token == BYTES_PER_TOKEN[v.size] for v in (*EDGE.vocabularies, *WIDE.vocabularies))


@pytest.mark.parametrize("space", [TINY, replace(TINY, blocks=(1,)), replace(TINY, blocks=(1, 3)), TWO_BLOCKS])
def test_candidates_are_complete_and_valid(space: Space) -> None:
    candidates = list(space.candidates())
    assert len(candidates) == len(set(candidates)) == space.size
    assert (
        len({space.architecture(candidate).id for candidate in candidates}) == space.size
    )  # none breaks a rule, all differ


@settings(max_examples=30, deadline=None)
@given(spaces())
def test_any_space_holds_what_its_dimensions_say(space: Space) -> None:
    count = 0
    for candidate in space.candidates():
        count += 1
        a, template = space.architecture(candidate), space.templates[candidate.template]
        assert len(a.blocks) in space.blocks and a.ffn in space.ffn and a.max_positions in space.contexts
        assert a.vocab_size == template.vocabulary.size and a.embedding_width in space.embedding_widths
        assert a.blocks[0].width >= space.least_width * a.embedding_width
        assert a.embedding_width >= space.least_embedding * a.blocks[-1].width
        for block in a.blocks:
            assert block.width in space.widths and block.layers in space.layers and block.shared in space.shared
            assert (
                block.heads // block.kv_heads in space.kv_groups and block.ffn_width / block.width in space.ffn_ratios
            )
    assert count == space.size
    assert space_file.from_dict(json.loads(json.dumps(space_file.to_dict(space)))) == space


@pytest.mark.parametrize("space", [TINY, TWO_BLOCKS])
def test_sampling_is_uniform(space: Space) -> None:
    rng = random.Random(0)
    counted = Counter(space.sample(rng) for _ in range(100 * space.size))
    assert set(counted) == set(space.candidates())
    chi_squared = sum((count - 100) ** 2 / 100 for count in counted.values())
    assert chi_squared < space.size + 5 * (2 * space.size) ** 0.5  # five standard deviations


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([PAPER, SMALL]), st.integers(0, 2**32))
def test_mutation_changes_one_block_and_stays_inside(space: Space, seed: int) -> None:
    rng = random.Random(seed)
    candidate = space.sample(rng)
    mutant = mutate(space, candidate, rng)
    assert sum(x != y for x, y in zip(candidate.choices, mutant.choices, strict=True)) <= 1
    space.architecture(mutant)


@pytest.mark.parametrize("space", [TINY, TWO_BLOCKS])
def test_mutations_reach_every_candidate_and_no_other(space: Space) -> None:
    rng = random.Random(0)
    candidate, every = space.sample(rng), set(space.candidates())
    seen: set[Candidate] = set()
    for _ in range(150 * space.size):
        candidate = mutate(space, candidate, rng)
        seen.add(candidate)
    assert seen == every


# --- files -----------------------------------------------------------------------------------------


def write(path: Path, **document: Any) -> str:
    path.write_text(json.dumps({"kind": "space", "schema_version": space_file.SCHEMA_VERSION, **document}))
    return str(path)


@pytest.mark.parametrize("space", [*SPACES.values(), SMALL, MIXED])
def test_file_round_trip(space: Space, tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    artefact.write_json(path, space_file.KIND, space_file.to_dict(space), space_file.SCHEMA_VERSION)
    assert load_space(str(path)) == space
    assert load_space(write(path, **space_file.to_dict(space))) == space  # by hand, without a hash


def test_a_person_can_write_a_space_in_three_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = load_space(
        write(path, name="mine", base="edge", widths=[256, 384], contexts=1024, model={"norm": "layernorm"})
    )
    changed = replace(
        EDGE, name="mine", widths=(256, 384), contexts=(1024,), model=replace(EDGE.model, norm="layernorm")
    )
    assert mine == changed and mine.origin == str(path)


def test_windows_are_a_choice_and_norms_of_queries_belong_to_the_model(tmp_path: Path) -> None:
    space = load_space(
        write(tmp_path / "s.json", name="s", base="demo", windows=[0, 64], model={"qk_norm": "head", "logit_cap": 30.0})
    )
    assert space.windows == (0, 64) and space.size == 8 * SPACES["demo"].size  # three blocks
    assert {block.window for block in space.block_choices} == {0, 64}
    a = space.architecture(space.sample(random.Random(0)))
    assert (a.qk_norm, a.logit_cap) == ("head", 30.0)
    plain = space_file.to_dict(SPACES["demo"])
    assert "windows" not in plain and not plain["model"].keys() & LATER[Architecture].keys()  # so hashes are as before


def test_what_a_file_leaves_out_has_one_value(tmp_path: Path) -> None:
    model = {"vocab_size": 300, "max_positions": 64, "embedding_width": 64, "head_dim": 32, "ffn": "gelu"}
    space = load_space(write(tmp_path / "s.json", name="s", widths=[64], ffn_ratios=2, layers=[1], model=model))
    assert space.size == 1
    a = space.architecture(Candidate(0, (0,)))
    assert (a.vocab_size, a.max_positions, a.embedding_width, a.ffn) == (300, 64, 64, "gelu")
    assert space.vocabularies[0].bytes_per_token is None and space.least_width == 0


def test_a_file_of_the_first_schema_is_still_read(tmp_path: Path) -> None:
    model = {"vocab_size": 300, "max_positions": 64, "embedding_width": 64, "head_dim": 32}
    first = {"schema_version": 1, "name": "old", "blocks": 2, "widths": [32, 64], "ffn_ratios": [1], "layers": [1, 2]}
    space = load_space(write(tmp_path / "s.json", **first, shared=True, model=model))
    assert space.size == 12 and space.shared == (True,) and space.blocks == (2,)


MODEL = space_file.to_dict(TINY)["model"]
BROKEN: list[tuple[dict[str, Any], type[MerinoError], str]] = [
    ({"widths": []}, InputError, "widths"),
    ({"widths": [128, 64]}, InputError, "widths"),
    ({"widths": [64, 100]}, InputError, "width 100"),
    ({"widths": ["64"]}, InputError, "widths"),
    ({"widths": [[64]]}, InputError, "widths"),
    ({"widths": {}}, InputError, "widths"),
    ({"widths": [64, 2**40]}, InputError, "widths"),
    ({"layers": [0, 1]}, InputError, "layers"),
    ({"layers": [1, 1024]}, InputError, "blocks x layers"),
    ({"ffn_ratios": [1.001]}, InputError, "FFN ratio 1.001"),
    ({"ffn_ratios": [True]}, InputError, "ffn_ratios"),
    ({"blocks": 0}, InputError, "blocks"),
    ({"blocks": "2"}, InputError, "blocks"),
    ({"blocks": [2, 1]}, InputError, "blocks"),
    ({"kv_groups": [3]}, InputError, "kv_groups"),
    ({"kv_groups": [0]}, InputError, "kv_groups"),
    ({"shared": 1}, InputError, "shared"),
    ({"shared": []}, InputError, "shared"),
    ({"shared": [True, True]}, InputError, "shared"),
    ({"ffn": "gilu"}, InputError, "ffn"),
    ({"ffn": [["relu"]]}, InputError, "ffn"),
    ({"embedding_widths": [-1]}, InputError, "embedding_widths"),
    ({"contexts": [1.5]}, InputError, "contexts"),
    ({"vocabularies": []}, InputError, "vocabularies"),
    ({"vocabularies": [9, 8]}, InputError, "vocabularies"),
    ({"vocabularies": ["9"]}, InputError, "vocabularies"),
    ({"vocabularies": [{"size": 9, "colour": 1}]}, ArtefactError, "vocabulary"),
    ({"vocabularies": [{"bytes_per_token": 3}]}, ArtefactError, "vocabulary"),
    ({"vocabularies": [{"size": 9, "bytes_per_token": 0}]}, InputError, "bytes_per_token"),
    ({"vocabularies": [{"size": 9, "bytes_per_token": "3"}]}, InputError, "bytes_per_token"),
    ({"vocabularies": [{"size": 9, "tokenizer": 3}]}, InputError, "tokenizer"),
    ({"vocabularies": [{"size": 0}]}, ArchitectureError, "vocab_size"),
    ({"least_width": -1}, InputError, "least_width"),
    ({"least_width": "half"}, InputError, "least_width"),
    ({"least_width": 2}, InputError, "no width goes with embedding width 256"),
    ({"least_embedding": 9}, InputError, "no width goes with embedding width 256"),
    ({"name": None}, ArtefactError, "name"),
    ({"model": []}, ArtefactError, "model"),
    ({"model": {"norm": "rmsnorm"}}, ArchitectureError, "head_dim"),
    ({"model": {**MODEL, "head_dim": "x"}}, ArchitectureError, "head_dim"),
    ({"model": {**MODEL, "head_dim": 0}}, ArchitectureError, "head_dim"),
    ({"model": {**MODEL, "vocab_size": 3}}, ArtefactError, "both vocabularies and the model's vocab_size"),
    ({"base": "hedge"}, ArtefactError, "choose one of paper, edge, wide, demo"),
    ({"base": ["edge"]}, ArtefactError, "base"),
    ({"base": "edge", "model": 3}, ArtefactError, "model"),
    ({"surprise": 1}, ArtefactError, "surprise"),
    ({"windows": []}, InputError, "windows"),
    ({"windows": [64, 0]}, InputError, "windows"),
    ({"windows": [0, True]}, InputError, "windows"),
    ({"windows": -1}, InputError, "windows"),
    ({"model": {**MODEL, "qk_norm": "all"}}, ArchitectureError, "qk_norm"),
    ({"model": {**MODEL, "convolution_bias": True}}, UnsupportedError, "no search has short convolutions"),
    ({"convolutions": [0, 3]}, UnsupportedError, "no search has short convolutions"),
    ({"widths": list(range(32, 16_384, 32)), "layers": list(range(1, 500))}, InputError, "outside 1 to"),
    ({"contexts": list(range(1, 20_000))}, InputError, "templates"),
    ({"kind": "architecture"}, ArtefactError, "not a search space"),
    ({"schema_version": 3}, ArtefactError, "version 3"),
]


@pytest.mark.parametrize(("change", "error", "words"), BROKEN)
def test_a_broken_file_is_refused(change: dict[str, Any], error: type[MerinoError], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "space.json", **{**space_file.to_dict(TINY), **change})
    with pytest.raises(error, match=words) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["name", "widths", "ffn_ratios", "layers", "model"])
def test_what_every_space_needs(name: str, tmp_path: Path) -> None:
    document = space_file.to_dict(TINY)
    del document[name]
    with pytest.raises(ArtefactError, match=f"missing {name}; add it, or name a base"):
        load_space(write(tmp_path / "space.json", **document))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match="paper, edge, wide, demo"):
        load_space("papre")
    with pytest.raises(ArtefactError, match="does not exist"):
        load_space("nowhere.json")


@pytest.mark.parametrize("name", ["", None, 3, ["paper"]])
def test_what_is_no_name_is_no_space(name: Any) -> None:
    with pytest.raises(InputError, match=r"^there is no space .*; choose one of paper, edge, wide, demo"):
        load_space(name)
