"""The transfer between tables, where the other machine's factor is known."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.linear_table import cost_ms
from merino_edge.errors import InputError
from merino_edge.latency.measurement import MODES, Measurement
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.transfer import FEWEST, chosen_entries, entries, transfer

Factor = Callable[[Measurement], float]


def lines() -> Iterator[Measurement]:
    for mode in MODES:
        for length in (16, 64, 256):
            for width in (64, 96, 128, 192, 256):
                for ratio in (1, 2, 4):
                    shape = {"width": width, "heads": 2, "kv_heads": 2, "ffn_width": width * ratio}
                    cost = cost_ms("layer", mode, length, shape)
                    yield Measurement("layer", mode, length, {"ffn": "relu", **shape}, (cost,))
            for before, after in ((64, 96), (96, 128), (128, 256)):
                shape = {"before": before, "after": after}
                yield Measurement("width_change", mode, length, shape, (cost_ms("width_change", mode, length, shape),))
            for vocab_size in (100, 200):
                shape = {"vocab_size": vocab_size, "embedding_width": 64}
                yield Measurement("end", mode, length, shape, (cost_ms("end", mode, length, shape),))


def table(factor: Factor = lambda m: 1.0) -> LatencyTable:
    header = {"estimated": False, "precision": "int4"}
    scaled = [dataclasses.replace(m, samples=(m.median_ms * factor(m),)) for m in lines()]
    return LatencyTable(Path("full.jsonl"), header, scaled, {}, "")


def errors_percent(factor: Factor, share: float = 0.1) -> list[float]:
    full, other = table(), table(factor)
    keys = {m.key for m in chosen_entries(full, share)}
    truth = {m.key: m.median_ms for m in other.measurements}
    filled = transfer(full, [m for m in other.measurements if m.key in keys])
    assert {m.key for m in filled} | keys == set(truth) and not keys & {m.key for m in filled}
    assert all(m.transferred for m in filled)
    return [100 * abs(m.median_ms / truth[m.key] - 1) for m in filled]


@pytest.mark.parametrize(
    ("factor", "most_percent"),
    [
        (lambda m: 3.0, 1.0),
        (lambda m: 0.2 if m.mode == "decode" else 7.0, 3.0),
        (lambda m: 2.0 if m.what == "layer" else 1.2, 5.0),
        (lambda m: 1.5 * m.median_ms**0.1, 3.0),  # large parts gain less, or more
        (lambda m: 1 + 0.3 * math.exp(-m.median_ms), 3.0),  # a launch cost
    ],
)
def test_a_tenth_of_the_entries_tells_the_rest(factor: Factor, most_percent: float) -> None:
    errors = errors_percent(factor)
    assert sum(errors) / len(errors) < most_percent


def test_more_entries_tell_more() -> None:
    def factor(m: Measurement) -> float:
        return 1.5 + 0.3 * math.sin(3 * math.log(m.length) + m.shape.get("width", 0) / 40)

    few, many = errors_percent(factor, 0.1), errors_percent(factor, 0.5)
    assert sum(many) / len(many) < sum(few) / len(few)


def test_every_kind_and_mode_is_among_the_chosen_and_the_order_is_by_information() -> None:
    chosen = chosen_entries(table())
    assert len(chosen) == round(0.1 * len(entries(table()))) >= FEWEST
    assert {(m.what, m.mode) for m in chosen} == {(m.what, m.mode) for m in lines()}
    assert [m.key for m in chosen_entries(table(), 0.2)][: len(chosen)] == [m.key for m in chosen]


def test_an_exact_measurement_outweighs_a_doubtful_one() -> None:
    full = table()
    chosen = chosen_entries(full)
    doubtful = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)

    def measured(spoilt: Measurement) -> list[Measurement]:
        samples = {m.key: (2 * m.median_ms,) for m in chosen}
        samples[spoilt.key] = tuple(spoilt.median_ms * factor for factor in doubtful)
        return [dataclasses.replace(m, samples=samples[m.key]) for m in chosen]

    layers = [m for m in chosen if (m.what, m.mode) == ("layer", "decode")]
    filled = transfer(full, measured(layers[-1]))
    known = {m.key: m.median_ms for m in full.measurements}
    ratios = [m.median_ms / known[m.key] for m in filled if (m.what, m.mode) == ("layer", "decode")]
    assert sum(abs(ratio / 2 - 1) for ratio in ratios) / len(ratios) < 0.05


def test_what_scatters_is_not_taken_for_a_law() -> None:
    """Each measurement is off by up to half, and says nothing of it."""
    full, rng = table(), random.Random(0)
    noisy = [
        dataclasses.replace(m, samples=(2 * m.median_ms * math.exp(rng.gauss(0, 0.3)),))
        for m in chosen_entries(full, 0.4)
    ]
    known = {m.key: m.median_ms for m in full.measurements}
    errors = [abs(m.median_ms / known[m.key] / 2 - 1) for m in transfer(full, noisy)]
    assert sum(errors) / len(errors) < 0.12


def test_a_shape_that_could_not_be_run_gets_no_time() -> None:
    full = table()
    first, *others = chosen_entries(full, 0.3)
    failed = dataclasses.replace(first, samples=(), failed="too wide")
    filled = transfer(full, [failed, *others])
    assert first.key not in {m.key for m in filled}
    assert {m.key for m in (*filled, *others)} == {m.key for m in full.measurements} - {first.key}


def test_tables_that_share_nothing_are_refused() -> None:
    full = table()
    with pytest.raises(InputError, match="share no entry in decode; measure it as the table says"):
        transfer(full, [])
    prefill = [m for m in full.measurements if m.mode == "prefill"]
    with pytest.raises(InputError, match="share no entry in decode"):
        transfer(full, prefill)
    with pytest.raises(InputError, match="share no entry in decode"):  # what was itself transferred tells nothing
        transfer(full, [dataclasses.replace(m, transferred=True) for m in full.measurements])
    few = LatencyTable(Path("few.jsonl"), full.header, full.lines[: FEWEST - 1], {}, "")
    with pytest.raises(InputError, match=r"few.jsonl has only 7 entries.*the table of a full profile"):
        chosen_entries(few)
