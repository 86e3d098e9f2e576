"""The TensorRT engine keeps the driver's rules: where it is broken, the strict stand-in for the driver finds it.

And where the driver fails, at whatever call, the engine refuses in one line and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.engine_conformance import ARCHITECTURE, CONTEXT, TOKENS, WEIGHTS
from helpers.fake_driver import FakeDriver
from helpers.stand_in_gpu import Context
from merino_edge import tensorrt_library
from merino_edge.errors import MerinoError, UnsupportedError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engines import kv_scatter_kernel
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.engines.tensorrt_plan import Plan

INJECTED = 50  # failures at random calls, through each package
STATUSES = (1, 2, 700, 719, 999)
NOTHING = {"contexts": 1}  # of PyCUDA, until the process ends
STEPS = [
    (0, 5),
    *((i, i + 1) for i in range(5, 12)),
    (12, 15),
    (4, 5),
    (5, 9),
    (9, 40),
    *((i, i + 1) for i in range(40, 44)),
]
Answers = list[np.ndarray]


@pytest.fixture(scope="module")
def plans() -> dict[int, bytes]:
    """A small model's graphs of two capacities, so that a sequence outgrows the first."""
    target = Target.named("rtx", "fp32", "primitive")
    stored = store(ARCHITECTURE, WEIGHTS, target)
    return {count: to_bytes(build_stored(ARCHITECTURE, stored, target, CONTEXT, count)) for count in (32, CONTEXT)}


def run(engine: TensorRtEngine) -> Answers:
    """Prompts, steps, a rewind, more capacity, and the largest logits."""
    answers = [engine.forward(TOKENS[start:end], start).copy() for start, end in STEPS]
    for position in range(44, 48):
        candidates = engine.forward_topk(TOKENS[position : position + 1], position, 5)
        answers.append(np.sort(candidates.logits)[-5:])  # without the kernel it is the whole row
    return answers


def answers(plans: dict[int, bytes]) -> Answers:
    with contextlib.closing(TensorRtEngine("any", dict(plans), ARCHITECTURE)) as engine:
        return run(engine)


def equal(first: Answers, second: Answers, rounding: float = 0) -> bool:
    """The plan of another capacity rounds otherwise: ONNX Runtime sums over more positions, in another order."""
    return all(np.allclose(a, b, rtol=0, atol=rounding) for a, b in zip(first, second, strict=True))


# --- breaking the engine, one rule after the other --------------------------------------------------


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "synchronize", lambda self: None)


def with_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "pinned", lambda self, shape, dtype: np.zeros(shape, dtype))


def with_an_allocation_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Plan._queue

    def allocating(self: Plan, *arguments: Any, **options: Any) -> None:
        self._cuda.allocate(8)
        queue(self, *arguments, **options)

    monkeypatch.setattr(Plan, "_queue", allocating)


def with_freed_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Plan._open

    def freeing(self: Plan, *arguments: Any) -> None:
        opened(self, *arguments)
        address = self._addresses["key_0"]
        self._cuda._addresses.remove(address)
        self._cuda._provider.free(address)

    monkeypatch.setattr(Plan, "_open", freeing)


def with_the_hosts_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "address_of", lambda self, pinned: pinned.ctypes.data)


def with_pointers_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_scatter_kernel, "POINTERS", 0)


def without_a_current_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "active", lambda self: contextlib.nullcontext())


def without_copies_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "to_device", lambda self, array, address: None)


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    break_it.__name__: break_it
    for break_it in (
        without_waiting,
        with_freed_caches,
        with_the_hosts_addresses,
        with_pointers_of_32_bits,
        without_a_current_context,
        without_copies_to_the_gpu,
    )
}


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_broken_engine_is_found_out(
    gpu: FakeDriver, package: str, plans: dict[int, bytes], monkeypatch: pytest.MonkeyPatch, break_it: str
) -> None:
    gpu.set(integrated=1 if break_it == "with_the_hosts_addresses" else 0)
    expected = answers(plans)
    BREAKS[break_it](monkeypatch)
    try:
        found = not equal(answers(plans), expected)
    except Exception:
        found = True
    monkeypatch.undo()
    gpu.reset()
    assert found


@pytest.mark.parametrize("break_it", [with_an_allocation_in_each_step, with_pageable_memory])
def test_what_a_capture_forbids_is_run_without_a_recording(
    gpu: FakeDriver,
    package: str,
    plans: dict[int, bytes],
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
) -> None:
    expected = answers(plans)
    launches = gpu.count("cuGraphLaunch")
    break_it(monkeypatch)
    assert equal(answers(plans), expected)
    assert 0 < launches == gpu.count("cuGraphLaunch")


def test_what_is_not_freed_is_counted(
    gpu: FakeDriver, package: str, plans: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cuda, "close", lambda self: None)
    answers(plans)
    held = {"executables"} if package == "pycuda" else {"memory", "streams", "executables", "modules", "contexts"}
    assert held <= gpu.held().keys()  # PyCUDA's objects free themselves
    gpu.reset()


# --- where the driver fails --------------------------------------------------------------------------


def test_a_failing_driver_is_one_line_and_leaves_nothing(
    gpu: FakeDriver, package: str, plans: dict[int, bytes]
) -> None:
    """At random calls. A refused recording is no failure: the answers are then the same."""
    before = gpu.calls
    expected = answers(plans)
    calls, refused, went_on = gpu.calls - before, 0, 0
    rng = random.Random(0)
    for _ in range(INJECTED):
        at, status = rng.randrange(calls), rng.choice(STATUSES)
        gpu.fail(at, status)
        refusal, engine = None, None
        try:
            engine = TensorRtEngine("any", dict(plans), ARCHITECTURE)
            assert equal(run(engine), expected)
            went_on += 1
        except MerinoError as error:
            # A copy: the frames of the error's own traceback hold PyCUDA's objects.
            refused, refusal = refused + 1, type(error)(error.message, error.hint)
        where = gpu.failed_in
        if engine is not None:
            if refusal is not None:  # the failure was of one call: the engine is usable
                assert equal(run(engine), expected, rounding=1e-5), where
            engine.close()
        assert refusal is None or ("\n" not in str(refusal) and refusal.hint), where
        assert gpu.held().items() <= NOTHING.items(), (where, status)
    assert refused > INJECTED / 4 and went_on > 0


def test_another_thread_may_run_the_engine(gpu: FakeDriver, package: str, plans: dict[int, bytes]) -> None:
    """As in the server, whose worker is a thread of its own."""
    expected, results = answers(plans), []
    engine = TensorRtEngine("any", dict(plans), ARCHITECTURE)
    for work in (lambda: results.append(run(engine)), engine.close):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert equal(results[0], expected)


@pytest.mark.parametrize("call", ["set_optimization_profile_async", "set_tensor_address", "set_input_shape"])
def test_what_tensorrt_says_no_to_is_refused(
    gpu: FakeDriver, plans: dict[int, bytes], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(Context, call, lambda self, *arguments: False)
    with pytest.raises(UnsupportedError, match="TensorRT refuses") as refusal:
        answers(plans)
    assert "--context" in refusal.value.hint


def test_what_is_said_to_a_refused_recording_is_not_the_reason_of_a_later_failure(
    gpu: FakeDriver, plans: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, log = tensorrt_library.load("any")
    runs = Context.execute_async_v3

    def not_recorded(self: Context, stream: int) -> bool:
        if gpu.is_capturing(stream):
            log.log(trt.ILogger.Severity.ERROR, "not permitted while the stream is captured")
        return not gpu.is_capturing(stream) and runs(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", not_recorded)
    with contextlib.closing(TensorRtEngine("any", dict(plans), ARCHITECTURE)) as engine:
        for position in range(3):
            engine.forward(TOKENS[position : position + 1], position)
        assert gpu.count("cuStreamBeginCapture_v2") == 1 and gpu.count("cuGraphLaunch") == 0
        monkeypatch.setattr(Context, "set_input_shape", lambda self, *arguments: False)
        with pytest.raises(UnsupportedError, match=tensorrt_library.NO_REASON):
            engine.forward(TOKENS[3:5], 3)


def test_a_cache_that_cannot_be_saved_leaves_no_memory(
    gpu: FakeDriver, plans: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError

    engine = TensorRtEngine("any", dict(plans), ARCHITECTURE)
    assert engine._plan is not None
    monkeypatch.setattr(engine._plan, "_rtx_cache", SimpleNamespace(save=fails))
    with pytest.raises(RuntimeError):
        engine.close()
