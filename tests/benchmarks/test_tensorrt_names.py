"""Every name that our code asks of TensorRT is in the bindings, and takes the arguments that it is given."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from merino_edge.tensorrt_library import RTX


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("tensorrt_names")


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")


def test_tensorrt_for_rtx_has_all_names(script: ModuleType, rtx: Any) -> None:
    names = {str(use) for use in script.uses()}
    assert {"Runtime.deserialize_cuda_engine", "IExecutionContext.execute_async_v3", "MemoryPoolType.WORKSPACE"} < names
    assert {"IRuntimeCache.deserialize", "ITimingCache.serialize", "INetworkDefinition.get_layer"} < names
    assert script.problems(rtx) == {}


def test_what_is_missing_or_takes_other_arguments_is_found(
    script: ModuleType, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = (
        script.Use("IExecutionContext", "execute_async_v4"),
        script.Use("IExecutionContext", "execute_async_v3", 2),
        script.Use("OnnxParser", "parse", 0),
        script.Use("OnnxParser", "parse", 1),
        script.Use("OnnxParser", "parse", 2),
        script.Use("ICudaEngine", "create_execution_context", 0),
        script.Use("ICudaEngine", "create_execution_context", 1),
        script.Use("IOptimizationProfile", "set_shape", 3),
        script.Use("INoClass", "name"),
    )
    monkeypatch.setattr(script, "uses", lambda: set(used))
    assert script.problems(rtx) == {
        "IExecutionContext.execute_async_v4": "missing",
        "IExecutionContext.execute_async_v3": "does not take 2 arguments",
        "OnnxParser.parse": "does not take 0 arguments",
        "IOptimizationProfile.set_shape": "does not take 3 arguments",
        "INoClass": "missing",
    }


def test_only_what_the_code_asks_for_first_may_be_missing(script: ModuleType) -> None:
    expected = {name for use in script.uses() for name in (use.owner, str(use)) if script.is_expected(name)}
    assert {"IRuntimeConfig", "ParserError.node_name", "IRuntimeCache.serialize", "ComputeCapability"} < expected
    assert not expected & {"", "Runtime", "ICudaEngine", "ICudaEngine.create_execution_context", "OnnxParser.parse"}
    assert script.problems(SimpleNamespace())["Runtime"] == "missing"
