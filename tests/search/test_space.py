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

from merino_edge import artefact
from merino_edge.errors import ArchitectureError, ArtefactError, InputError, MerinoError
from merino_edge.search.space import DEMO, KIND, PAPER, SPACES, Space, load_space

SMALL = replace(DEMO, name="small", blocks=2, widths=(64, 128, 256), ffn_ratios=(1, 4), layers=(1, 3))


def test_paper_space_is_table_5() -> None:
    assert PAPER.size == 304_254_720  # 495 non-decreasing widths x (7 x 4) ** 4
    assert (PAPER.blocks, len(PAPER.widths), len(PAPER.ffn_ratios), PAPER.layers) == (4, 9, 7, (1, 2, 3, 4))
    a = PAPER.architecture(PAPER.sample(random.Random(0)))
    assert (a.vocab_size, a.max_positions, a.embedding_width, a.head_dim) == (50272, 2048, 768, 64)
    assert all(block.shared for block in a.blocks)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_enumeration_is_complete_and_valid(blocks: int) -> None:
    space = replace(SMALL, blocks=blocks)
    genomes = list(space.genomes())
    assert len(genomes) == len(set(genomes)) == space.size
    assert len({space.architecture(genome).id for genome in genomes}) == space.size  # none breaks a rule, all differ


def test_sampling_is_uniform() -> None:
    rng = random.Random(0)
    counted = Counter(SMALL.sample(rng) for _ in range(100 * SMALL.size))
    assert set(counted) == set(SMALL.genomes())
    chi_squared = sum((count - 100) ** 2 / 100 for count in counted.values())
    assert chi_squared < SMALL.size + 5 * (2 * SMALL.size) ** 0.5  # five standard deviations


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([PAPER, DEMO, SMALL]), st.integers(0, 2**32))
def test_mutation_changes_one_block_and_stays_inside(space: Space, seed: int) -> None:
    rng = random.Random(seed)
    genome = space.sample(rng)
    mutant = space.mutate(genome, rng)
    assert sum(x != y for x, y in zip(genome, mutant, strict=True)) <= 1
    space.architecture(mutant)


def test_mutations_reach_every_genome() -> None:
    rng, seen = random.Random(0), {(0, 0)}
    genome = (0, 0)
    for _ in range(100 * SMALL.size):
        genome = SMALL.mutate(genome, rng)
        seen.add(genome)
    assert len(seen) == SMALL.size


@pytest.mark.parametrize("space", [*SPACES.values(), SMALL])
def test_file_round_trip(space: Space, tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    artefact.write_json(path, KIND, space.to_dict())
    loaded = load_space(str(path))
    genome = space.sample(random.Random(1))
    assert loaded.to_dict() == space.to_dict() and loaded.architecture(genome) == space.architecture(genome)


def test_a_hand_written_file_needs_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"kind": "space", "schema_version": 1, **SMALL.to_dict()}), encoding="utf-8")
    assert load_space(str(path)).size == SMALL.size


BROKEN: list[tuple[dict[str, Any], type[MerinoError], str]] = [
    ({"widths": []}, InputError, "widths"),
    ({"widths": [128, 64]}, InputError, "widths"),
    ({"widths": [64, 100]}, InputError, "width 100"),
    ({"widths": ["64"]}, InputError, "widths"),
    ({"widths": [[64]]}, InputError, "widths"),
    ({"widths": 64}, ArtefactError, "lists"),
    ({"layers": [0, 1]}, InputError, "layers"),
    ({"layers": [1, 1024]}, ArchitectureError, "layers"),
    ({"ffn_ratios": [1.001]}, InputError, "FFN ratio 1.001"),
    ({"ffn_ratios": [True]}, InputError, "ffn_ratios"),
    ({"blocks": 0}, InputError, "blocks"),
    ({"blocks": "2"}, InputError, "blocks"),
    ({"shared": 1}, ArtefactError, "shared"),
    ({"name": None}, ArtefactError, "name"),
    ({"model": []}, ArtefactError, "model"),
    ({"model": {"vocab_size": 10}}, ArchitectureError, "missing"),
    ({"model": {**SMALL.to_dict()["model"], "head_dim": "x"}}, ArchitectureError, "head_dim"),
    ({"model": {**SMALL.to_dict()["model"], "head_dim": 0}}, ArchitectureError, "head_dim"),
    ({"surprise": 1}, ArtefactError, "surprise"),
    ({"widths": list(range(32, 16_384, 32)), "layers": list(range(1, 500))}, InputError, "outside 1 to"),
    ({"kind": "architecture"}, ArtefactError, "expected 'space'"),
    ({"schema_version": 2}, ArtefactError, "version 2"),
]


@pytest.mark.parametrize(("change", "error", "words"), BROKEN)
def test_a_broken_file_is_refused(change: dict[str, Any], error: type[MerinoError], words: str, tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    document = {"kind": "space", "schema_version": 1, **SMALL.to_dict(), **change}
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(error, match=words) as caught:
        load_space(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match="paper, demo"):
        load_space("papre")
    with pytest.raises(ArtefactError, match="does not exist"):
        load_space("nowhere.json")
