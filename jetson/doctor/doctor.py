"""The doctor: what this machine has, which features work, what each verb lacks, and the findings of the checks.

Its output is the block to paste into a request for help. Packages are looked up, not imported; features are tried. This
module knows no verb's code, only which packages a verb needs and which extra brings them.
"""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merino_edge import __version__, tensorrt_library
from merino_edge.jetson.device.sensors import Sensors
from merino_edge.jetson.doctor.checks import run_checks
from merino_edge.jetson.doctor.environment import Environment
from merino_edge.jetson.doctor.features import features

CUDA_BINDINGS, PYCUDA = "cuda-bindings", "pycuda"  # either does
# The names of modules that differ from their package's.
MODULES = {
    "onnx-ir": "onnx_ir",
    "tensorrt-rtx-cu12-bindings": "tensorrt_rtx_bindings",
    CUDA_BINDINGS: "cuda.bindings",
    "prometheus-client": "prometheus_client",
    "lm-eval": "lm_eval",
}
BASE = ("numpy", "typer", "rich", "tokenizers", "onnxruntime", "jinja2")
# verb: (packages beyond the base, extras that bring them)
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "profile": (("onnx", "onnx-ir"), "export"),
    "estimate": ((), ""),
    "search": ((), ""),
    "pareto": ((), ""),
    "verify": ((), ""),
    "distill": (("torch", "safetensors"), "train"),
    "tokenize": ((), ""),
    "train": (("torch", "safetensors"), "train"),
    "study": (("torch", "safetensors", "scipy", "matplotlib"), "train,study"),
    "evaluate": (("lm-eval",), "evaluate"),
    "import": (("gguf", "safetensors"), "import"),
    "export": (("torch", "safetensors", "onnx", "onnx-ir"), "train,export"),
    "export-hf": (("safetensors",), "train"),
    "build": ((), ""),  # of a bundle for ONNX Runtime; TensorRT's engines below
    "targets": (("onnx-ir",), "export"),
    "run": ((), ""),  # of a bundle; other models below
    "generate": ((), ""),
    "serve": (("starlette", "uvicorn", "pydantic", "prometheus-client", "llguidance"), "serve"),
    "bench": ((), ""),
    "show": ((), ""),
    "demo": (("torch", "safetensors", "onnx", "onnx-ir"), "train,export"),
}
# Optional abilities of verbs, and the extra that brings them.
OPTIONAL = {
    "models that are no bundles yet (run, generate, serve, bench)": (
        ("gguf", "safetensors", "torch", "onnx", "onnx-ir"),
        "import,train,export",
    ),
    "answers of a given form (generate --json-schema, --regex)": (("llguidance",), "grammar"),
    "data sets of Hugging Face as text (hf:NAME)": (("datasets",), "datasets"),
    "plots (profile, search, pareto --plot)": (("matplotlib",), "plot"),
    "reading an export back by TensorRT for RTX": (("tensorrt-rtx-cu12-bindings",), "rtx"),
    "engines of TensorRT on a board (build)": (("tensorrt", CUDA_BINDINGS, "onnx-ir"), "tensorrt,export"),
}


def installed(package: str) -> str | None:
    """The version of a package that can be imported, else None."""
    try:
        spec = find_spec(MODULES.get(package, package))
    except ModuleNotFoundError:  # of a parent
        return None
    if spec is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:  # importable without package data, as JetPack's TensorRT can be
        return "unknown"


def examine(root: Path | str = "/") -> dict[str, Any]:
    """The state of the machine whose file system stands at `root`, as a JSON object.

        {"merino_edge", "python", "device": card, "packages": {name: version or null},
         "features": {name: {"on", "why"}},
         "sensors": {"power_source", "power_mw", "temperature_c", "clock_mhz", "throttle_events", "power_mode"},
         "verbs": {verb: {"ok", "missing": [...], "fix": command or null}}, "optional": {the same by purpose},
         "traps": [{"name", "found", "advice", "source"}]}

    "traps" holds the checks' findings.
    """
    environment, sensors = Environment.of(root), Sensors(root)
    names = [*BASE, PYCUDA, *(p for packages, _ in (*NEEDS.values(), *OPTIONAL.values()) for p in packages)]
    packages = {name: installed(name) for name in dict.fromkeys(names)}

    def state(needed: tuple[str, ...], extras: str) -> dict[str, Any]:
        missing = [
            name for name in needed if packages[name] is None and not (name == CUDA_BINDINGS and packages[PYCUDA])
        ]
        return {"ok": not missing, "missing": missing, "fix": _fix(extras, missing, Path(root)) if missing else None}

    return {
        "merino_edge": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}",
        "device": environment.card,
        "sensors": {"power_source": sensors.power_source, **dataclasses.asdict(sensors.read())},
        "packages": packages,
        "verbs": {verb: state((*BASE, *needed), extras) for verb, (needed, extras) in NEEDS.items()},
        "optional": {purpose: state(needed, extras) for purpose, (needed, extras) in OPTIONAL.items()},
        "features": features(sensors, root),
        "traps": run_checks(environment),
    }


def _fix(extras: str, missing: list[str], root: Path) -> str:
    pip = f"pip install 'merino-edge[{extras}]'" if extras else "pip install merino-edge"
    if "tensorrt" not in missing:
        return pip
    hint = tensorrt_library.install_hint("tensorrt", root)
    if hint.startswith("run: pip"):
        return pip
    return f"{hint}; then in it: pip install 'merino-edge[jetson]'"  # pip's TensorRT is not a board's
