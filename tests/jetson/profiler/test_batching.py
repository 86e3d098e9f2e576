"""Batches fit in memory, lose no probe, and repeat whole models in every part of a profile."""

from __future__ import annotations

import pytest

from merino_edge.jetson.profiler import batching, profiler
from merino_edge.jetson.profiler.backends import backend_named
from merino_edge.jetson.profiler.profiler import Request
from merino_edge.search.space import Space

CPU = backend_named("onnxruntime-cpu")


def test_batches_fit_in_memory_and_lose_nothing(monkeypatch: pytest.MonkeyPatch, tiny_space: Space) -> None:
    request = Request(tiny_space, {}, "fp32", 1, CPU, 1.0)
    probes = profiler.prepare(request).plan.probes
    monkeypatch.setattr(batching, "BATCH_BYTES", 700_000)
    found = batching.make_batches(probes, quick=True, max_rounds=9)
    last = [p.key for batch in found if batch.last for p in batch.probes]
    assert sorted(last) == sorted(p.key for p in probes) and len(found) > 2
    assert found == batching.make_batches(probes, quick=True, max_rounds=9)
    for batch in found:
        models = {a for p in batch.probes for a in p.models}
        assert len({p.models for p in batch.probes}) == 1 or 4 * sum(a.parameters for a in models) <= 700_000


def test_whole_models_come_in_every_part_of_the_session(tiny_space: Space) -> None:
    probes = profiler.prepare(Request(tiny_space, {}, "fp32", 1, CPU, 1.0)).plan.probes
    for quick, times in ((True, batching.QUICK_REPETITIONS), (False, batching.FULL_REPETITIONS)):
        found = [p.key for batch in batching.make_batches(probes, quick=quick, max_rounds=9) for p in batch.probes]
        assert {found.count(p.key) for p in probes if p.what == "model"} == {times}
        assert {found.count(p.key) for p in probes if p.what == "layer"} == {1}
