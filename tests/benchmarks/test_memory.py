"""Counted memory against what engines hold: the CPU engine in a process of its own, TensorRT by its compiler's log.

The scripts are those whose figures docs/stored-bytes.md has.
"""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest

from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture, Block
from merino_edge.counts import PRECISIONS
from merino_edge.search.budget import Metric
from merino_edge.search.builtin_spaces import EDGE
from merino_edge.search.costs import CostModel
from merino_edge.search.space import Vocabulary

CPUINFO = Path("/proc/cpuinfo")
WIDE = Architecture(
    vocab_size=4096,
    max_positions=512,
    embedding_width=256,
    head_dim=64,
    blocks=(Block(256, 2, 4, 2, 1024),),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=64,
    bias="none",
)


def script(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module(name)


@pytest.mark.skipif(
    not CPUINFO.exists() or " avx2 " not in CPUINFO.read_text(), reason="kernels of other CPUs pack matrices otherwise"
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_cpu_engine_holds_what_is_counted(
    precision: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = script("peak_memory", repository, monkeypatch)
    a = EDGE.architecture(EDGE.sample(random.Random(1)))
    counted = memory.counted_bytes(a, precision)
    measured, *_ = memory.measured_bytes(a, precision)
    if measured < counted:  # the system may have taken pages back before the peak: the larger of two is nearer to it
        measured = max(measured, memory.measured_bytes(a, precision)[0])
    assert counted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("precision", "lowering"), [("fp16", "native"), ("int4", "native"), ("fp32", "primitive")])
def test_tensorrt_reserves_what_is_counted(
    precision: str, lowering: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tensorrt_library.RTX, reason="the extra [rtx] has no package for this machine")
    memory, lines = script("engine_memory", repository, monkeypatch), list[str]()
    monkeypatch.setattr(tensorrt_library, "new_log", memory.log_lines(lines))
    reserved = memory.reserved_bytes(WIDE, precision, lowering, lines)
    assert len(lines) == 3  # activations of two profiles, and weights
    cost = CostModel(precision, target=memory.TARGET).metric_cost(Metric("peak_mb", 1), Vocabulary(WIDE.vocab_size))
    assert 1e6 * cost.value(WIDE) == pytest.approx(reserved, rel=0.1)
